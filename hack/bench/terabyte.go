// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// The disk of 1 TiB, nearly all of which are holes, and in how many places it has data.
const (
	terabyte       = 1 << 40
	terabytePlaces = 200
)

// What the case about it measures.
const (
	diskPublished = "disk.img of 1 TiB published"
	blockCreated  = "block claim of 1 TiB created"
	diskExtents   = "extents of 1 TiB"
)

// wholeDisks measures clones of a large disk: one that is published as disk.img, and one that is a block claim.
func wholeDisks(ctx context.Context, b *bench, d *bed) (err error) {
	write := func(path string) error { return writeSparse(path, int64(b.n(2<<30, 64<<20))/terabytePlaces) }
	w, err := b.newWithContents(ctx, d, "disk", write, "--max-inline-size", "0")
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	k := key{Case: "contents-disk", Pool: d.kind.name, FS: "disk"}
	v := w.volume("", terabyte)
	by := overDisk{overContent{overCSI{w.client}}}
	if _, err := w.first(ctx, by, v); err != nil {
		return err
	}
	n, err := w.extents()
	if err != nil {
		return err
	}
	k.What, k.Way = diskExtents, plugin
	b.add(k, n)
	if err := errors.Join(by.unpublish(ctx, v), by.tidy(v)); err != nil {
		return err
	}
	for range b.rounds(30, 10, 5*time.Second) {
		for _, step := range []func(context.Context, withContents, key, way) error{b.diskOnce, b.blockOnce} {
			if err := step(ctx, w, k, by); err != nil {
				return err
			}
			time.Sleep(pause)
		}
	}
	return nil
}

// overDisk is the plugin, asked for a disk image.
type overDisk struct{ overContent }

func (w overDisk) prepare(v *volume) error {
	v.csi.Context["publishAs"] = "diskImage"
	return w.overContent.prepare(v)
}

// writeSparse writes the disk with so many bytes in each place.
func writeSparse(path string, bytes int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	piece := make([]byte, bytes)
	rand.NewChaCha8([32]byte{}).Read(piece)
	for i := range int64(terabytePlaces) {
		if _, err := f.WriteAt(piece, i*(terabyte/terabytePlaces)&^0xffff); err != nil {
			return err
		}
	}
	return f.Truncate(terabyte)
}

func (b *bench) diskOnce(ctx context.Context, w withContents, k key, by way) error {
	published, _, err := b.live(ctx, by, w.volume("", terabyte))
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	k.What = diskPublished
	b.add(k, milliseconds(published))
	return nil
}

func (b *bench) blockOnce(ctx context.Context, w withContents, k key, _ way) error {
	v := w.volume("", terabyte)
	r := harness.CreateRequest(v.id, v.size, harness.Block(), map[string]string{"content": contentName})
	began := time.Now()
	made, err := w.client.Create(ctx, r)
	if err != nil {
		return fmt.Errorf("CreateVolume: %w", err)
	}
	k.What = blockCreated
	b.add(k, milliseconds(time.Since(began)))
	return w.client.Delete(ctx, made.VolumeId)
}
