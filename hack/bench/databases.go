// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
)

// databaseCount is how many pods start at once, each with a database cluster of its own. databaseTries is how many of
// these get a server.
const (
	databaseCount = 100
	databaseTries = 3
)

// What the case about them measures. The second one makes machines comparable.
var (
	allDatabases = fmt.Sprintf("%d databases published", databaseCount)
	eachDatabase = "a database, time of all processors"
)

// databases measures how long 100 volumes take that are born with PostgreSQL's data directory: ready ones, and ones
// that are made on demand.
func databases(ctx context.Context, b *bench, d *bed) (err error) {
	p, err := findPostgres()
	if err != nil {
		return err
	}
	w, err := b.newWithContents(ctx, d, "tar", func(path string) error { return p.archiveNew(ctx, path) })
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	by := overContent{overCSI{w.client}}
	v := w.volume("ext4", volumeSize)
	if _, err := w.first(ctx, by, v); err != nil {
		return err
	}
	if err := errors.Join(by.unpublish(ctx, v), by.tidy(v)); err != nil {
		return err
	}
	at := key{Case: "contents-databases", Pool: d.kind.name, FS: "ext4", Way: plugin}
	if err := b.allAtOnce(ctx, w, by, at, func([]*volume) error { return nil }); err != nil {
		return err
	}
	if err := w.again(ctx, b, "--warm", fmt.Sprint(databaseCount), "--warm-max", fmt.Sprint(databaseCount)); err != nil {
		return err
	}
	if _, _, err := b.live(ctx, by, w.volume("ext4", volumeSize)); err != nil { // so that they are kept ready
		return err
	}
	at.Way = ready
	return b.allAtOnce(ctx, w, by, at, func(vs []*volume) error { return b.tryDatabases(ctx, p, vs[:databaseTries]) })
}

// archiveNew archives the directory of a new database cluster, which it makes beside the archive, and removes.
func (p programs) archiveNew(ctx context.Context, archive string) (err error) {
	dir := archive + ".dir"
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	data := dataDir(&volume{target: dir})
	if err := errors.Join(os.Mkdir(dir, 0o755), p.own(data)); err != nil {
		return err
	}
	if err := p.initdb(ctx, data); err != nil {
		return err
	}
	return archiveDir(archive, dir)
}

// allAtOnce measures from the first call until the last answer. What try does with the volumes is not measured.
func (b *bench) allAtOnce(ctx context.Context, w withContents, by way, at key, try func([]*volume) error) error {
	for i := range b.rounds(7, 2, 8*time.Second) {
		if at.Way == ready {
			if err := w.full(ctx); err != nil {
				return err
			}
		}
		vs := w.some("ext4", databaseCount)
		if err := each(len(vs), vs, by.prepare); err != nil {
			return err
		}
		time.Sleep(10 * pause)
		began := time.Now()
		err := each(len(vs), vs, func(v *volume) error { return by.publish(ctx, v) })
		took := milliseconds(time.Since(began))
		if err == nil && i == 0 {
			err = try(vs)
		}
		if err := errors.Join(err, b.takeAway(ctx, by, vs)); err != nil {
			return err
		}
		at.What = allDatabases
		b.add(at, took)
		at.What = eachDatabase
		b.add(at, took*float64(runtime.NumCPU())/databaseCount)
	}
	return nil
}

// tryDatabases has a server in each volume at the same time. Each makes the same table, which it can only make once.
func (b *bench) tryDatabases(ctx context.Context, p programs, vs []*volume) (err error) {
	for _, v := range vs {
		s, serveErr := p.serve(ctx, b.dir, v)
		if serveErr != nil {
			return serveErr
		}
		defer func() { err = errors.Join(err, s.stop()) }()
		if err := s.psql(ctx, "--command=CREATE TABLE mine AS SELECT count(*) FROM pgbench_accounts"); err != nil {
			return err
		}
	}
	return nil
}
