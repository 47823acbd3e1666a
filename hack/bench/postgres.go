// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

const (
	// pgScale makes a database of 60 MiB. With more clients than that they wait for each other's rows: pgbench(1).
	pgScale   = 4
	pgClients = 4
	// pgTests is how many databases a test suite makes and drops in one turn: one for each test.
	pgTests = 3
)

// postgres measures a database server in ext4 volumes: how long initdb takes, pgbench's transactions, and databases that
// a test suite makes, fills and drops.
func postgres(ctx context.Context, b *bench, d *bed) error {
	p, err := findPostgres()
	if err != nil {
		return err
	}
	all, err := b.openAll(ctx, d, key{Case: "postgres", Pool: d.kind.name, FS: "ext4"}, contentWays...)
	if err != nil {
		return err
	}
	for range b.rounds(3, 1, 8*time.Second) {
		if err := b.initialise(ctx, d, p, all); err != nil {
			return err
		}
	}
	if err := b.serve(ctx, d, p, all); err != nil {
		return err
	}
	return b.closeAll(ctx, d, all)
}

// initialise makes a database cluster in each volume, in place of one that is there.
func (b *bench) initialise(ctx context.Context, d *bed, p programs, all []opened) error {
	for _, i := range b.rand.Perm(len(all)) {
		o := all[i]
		data := dataDir(o.v)
		if err := errors.Join(os.RemoveAll(data), p.own(data), d.settle(o.v)); err != nil {
			return err
		}
		began := time.Now()
		if err := p.initdb(ctx, data); err != nil {
			return fmt.Errorf("%s: %w", o.k.Way, err)
		}
		o.k.What = "initdb"
		b.add(o.k, milliseconds(time.Since(began)))
		if err := d.settle(o.v); err != nil {
			return err
		}
	}
	return nil
}

// serve has a server in each volume, and lets them take turns.
func (b *bench) serve(ctx context.Context, d *bed, p programs, all []opened) (err error) {
	servers := make([]*server, len(all))
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.stop())
		}
	}()
	for i, o := range all {
		if servers[i], err = p.serve(ctx, b.dir, o.v); err != nil {
			return fmt.Errorf("%s: %w", o.k.Way, err)
		}
	}
	for range b.rounds(6, 1, 17*time.Second) {
		for _, i := range b.rand.Perm(len(all)) {
			if err := b.transact(ctx, all[i].k, servers[i]); err != nil {
				return fmt.Errorf("%s: %w", all[i].k.Way, err)
			}
			if err := d.settle(all[i].v); err != nil {
				return err
			}
		}
	}
	return nil
}

// transact measures a server in one turn. Each turn ends with a checkpoint, which DROP DATABASE makes, so that the next
// one begins with an empty log.
func (b *bench) transact(ctx context.Context, k key, s *server) error {
	rate, err := s.pgbench(ctx)
	if err != nil {
		return err
	}
	k.What = "pgbench"
	b.add(k, rate)
	began := time.Now()
	if err := s.psql(ctx, "--file="+s.suite); err != nil {
		return err
	}
	k.What = "databases made, filled and dropped"
	b.add(k, pgTests/time.Since(began).Seconds())
	return nil
}

// suite is what a test suite does to a server: for each test a database of its own, with 20 tables of 100 rows. It waits
// until its own session there has ended: DROP DATABASE would look again after 100 ms only.
func suite(tests int) string {
	var w strings.Builder
	for range tests {
		w.WriteString("CREATE DATABASE suite;\n\\connect suite\n")
		for table := range 20 {
			fmt.Fprintf(&w, "CREATE TABLE t%d (id int PRIMARY KEY, name text NOT NULL);\n", table)
			fmt.Fprintf(&w, "INSERT INTO t%d SELECT i, md5(i::text) FROM generate_series(1, 100) i;\n", table)
		}
		w.WriteString("\\connect postgres\nDO $$ BEGIN WHILE EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'suite') LOOP " +
			"PERFORM pg_sleep(0.001), pg_stat_clear_snapshot(); END LOOP; END $$;\nDROP DATABASE suite;\n")
	}
	return w.String()
}
