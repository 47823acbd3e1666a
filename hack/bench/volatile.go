// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// synced are two patterns: a file that grows, as a build's log does, where each write changes data and metadata, and one
// that is there, as a database's log that is used again. Disk statistics are left out, since fio takes longer for them
// than for the pattern.
var synced = []pattern{
	{"synced 8 KiB appends", syncedWrites("--fallocate=none", "--size=256M"), "write", operations},
	{"synced 8 KiB overwrites", syncedWrites("--overwrite=1", fmt.Sprintf("--size=%dM", laidOutMiB)), "write", operations},
}

// laidOutMiB is the size of the file that is overwritten: that of one segment of PostgreSQL's log.
const laidOutMiB = 16

func syncedWrites(more ...string) []string {
	return append([]string{"--rw=write", "--bs=8k", "--fsync=1", "--ioengine=psync", "--direct=0", "--runtime=200ms", "--disk_util=0"}, more...)
}

// syncs measures writes of which each is synced, in volumes of each filesystem and beside them.
func syncs(ctx context.Context, b *bench, d *bed) error {
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("%w: %w", errMissing, err)
	}
	k := key{Case: "volatile", Pool: d.kind.name}
	all, err := b.openAll(ctx, d, k, emptyDir, tmpfs)
	if err != nil {
		return err
	}
	for _, k.FS = range filesystems {
		more, err := b.openAll(ctx, d, k, plugin, volatile)
		if err != nil {
			return err
		}
		all = append(all, more...)
	}
	for range b.rounds(4, 1, 12*time.Second) {
		for _, i := range b.rand.Perm(len(all)) {
			for _, p := range synced {
				if err := b.sync(ctx, d, all[i], p); err != nil {
					return err
				}
			}
		}
	}
	return b.closeAll(ctx, d, all)
}

// sync measures a pattern in a volume, on a file that is as long as it is to be overwritten.
func (b *bench) sync(ctx context.Context, d *bed, o opened, p pattern) error {
	file := filepath.Join(o.v.target, "fio")
	if err := errors.Join(fill(file, laidOutMiB), d.settle(o.v)); err != nil {
		return err
	}
	if p.name == synced[0].name { // it begins with an empty one
		if err := os.Truncate(file, 0); err != nil {
			return err
		}
	}
	x, err := p.run(ctx, file)
	if err := errors.Join(err, os.RemoveAll(file), d.settle(o.v)); err != nil {
		return err
	}
	o.k.What = p.name
	b.add(o.k, x)
	return nil
}

// opened is a published volume, and the series that is measured inside.
type opened struct {
	k key
	v *volume
}

// openAll publishes a volume by each of some ways.
func (b *bench) openAll(ctx context.Context, d *bed, k key, ways ...string) (all []opened, err error) {
	for _, k.Way = range ways {
		o := opened{k, d.volume(k.FS, volumeSize)}
		w := d.ways[k.Way]
		if err := w.prepare(o.v); err != nil {
			return all, err
		}
		if err := w.publish(ctx, o.v); err != nil {
			return all, fmt.Errorf("%s of %s: %w", k.Way, k.FS, err)
		}
		all = append(all, o)
	}
	return all, b.note(d)
}

// closeAll takes the volumes away.
func (b *bench) closeAll(ctx context.Context, d *bed, all []opened) error {
	for _, o := range all {
		if err := b.takeAway(ctx, d.ways[o.k.Way], []*volume{o.v}); err != nil {
			return fmt.Errorf("%s of %s: %w", o.k.Way, o.k.FS, err)
		}
	}
	return nil
}

// settle writes what a turn has left in memory, which is nobody's next turn.
func (d *bed) settle(v *volume) error { return errors.Join(syncFS(v.target), syncFS(d.root)) }
