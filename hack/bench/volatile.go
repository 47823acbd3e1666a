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

// syncedWrites appends to a file, as a database does to its log: each write changes data and metadata. Nothing is
// allocated ahead. Disk statistics are left out, since fio takes longer for them than for the pattern.
var syncedWrites = pattern{
	"fsynced 8 KiB write", []string{"--rw=write", "--bs=8k", "--fsync=1", "--ioengine=psync", "--direct=0",
		"--fallocate=none", "--size=256M", "--runtime=200ms", "--disk_util=0"}, "write", operations,
}

// syncs measures writes of which each is synced, in volumes of each filesystem and beside them.
func syncs(ctx context.Context, b *bench, d *bed) error {
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("%w: %w", errMissing, err)
	}
	k := key{Case: "volatile", Pool: d.kind.name, What: syncedWrites.name}
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
	for range b.rounds(5, 1, 9*time.Second) {
		for _, i := range b.rand.Perm(len(all)) {
			file := filepath.Join(all[i].v.target, "fio")
			x, err := syncedWrites.run(ctx, file)
			if err := errors.Join(err, os.RemoveAll(file), d.settle(all[i].v)); err != nil {
				return err
			}
			b.add(all[i].k, x)
		}
	}
	return b.closeAll(ctx, d, all)
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
