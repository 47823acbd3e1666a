// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	// dirtyMiB is what is written to a volume, and not synced, before it is unpublished.
	dirtyMiB = 800
	// dirtySize is the size of the volume. In a smaller one ext4 begins to write at once what is written to it: see
	// ext4_nonda_switch in fs/ext4/inode.c.
	dirtySize = 4 << 30
)

// dirty measures unpublish of a volume whose data are still in memory, beside umount and unlink of the same.
func dirty(ctx context.Context, b *bench, d *bed) error {
	for _, fs := range filesystems {
		if err := b.once(ctx, d, plugin, d.volume(fs, dirtySize)); err != nil { // builds the template
			return err
		}
		for range b.rounds(3, 1, 6*time.Second) {
			for _, name := range b.shuffled([]string{plugin, floor}) {
				k := key{Case: "dirty", Pool: d.kind.name, FS: fs, Way: name}
				if err := b.dirtyOf(ctx, d, k); err != nil {
					return fmt.Errorf("%s of %s: %w", name, fs, err)
				}
			}
		}
	}
	return nil
}

func (b *bench) dirtyOf(ctx context.Context, d *bed, k key) error {
	w, v := d.ways[k.Way], d.volume(k.FS, dirtySize)
	if err := w.prepare(v); err != nil {
		return err
	}
	if err := w.publish(ctx, v); err != nil {
		return err
	}
	if err := fill(filepath.Join(v.target, "data"), dirtyMiB); err != nil {
		return err
	}
	before, err := d.written()
	if err != nil {
		return err
	}
	took, err := timed(ctx, v, w.unpublish)
	if err != nil {
		return err
	}
	after, err := d.written()
	if err != nil {
		return err
	}
	k.What = "unpublish, 800 MiB dirty"
	b.add(k, milliseconds(took))
	k.What = "written by it"
	b.add(k, float64(after-before)/(1<<20))
	// What is left to do for the pool is nobody's next turn.
	if err := syncFS(d.root); err != nil {
		return err
	}
	return w.tidy(v)
}

// fill writes a file, and leaves it to the kernel when that gets to the disk.
func fill(path string, mib int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	for range mib {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Close()
}
