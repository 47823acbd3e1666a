// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// atOnce is how many volumes are made at the same time, and how many in all. One at a time nobody rests either, so that
// what happens after an answer slows the next volume.
var atOnce = []struct{ workers, volumes int }{{1, 16}, {8, 64}, {32, 96}}

// rate measures volumes a second: whole lives, each worker's one after the other, and publishing alone.
func rate(ctx context.Context, b *bench, d *bed) error {
	for _, fs := range filesystems {
		for range b.rounds(3, 1, 7*time.Second) {
			for _, c := range atOnce {
				for _, name := range b.shuffled(d.names(habit, otherHabit, emptyDir, floorUUID, claim)) {
					k := key{Case: "rate", Pool: d.kind.name, FS: fs, Way: name}
					if err := b.rateOf(ctx, d, k, c.workers, c.volumes); err != nil {
						return fmt.Errorf("%s of %s, %d at once: %w", name, fs, c.workers, err)
					}
				}
			}
		}
	}
	return nil
}

func (b *bench) rateOf(ctx context.Context, d *bed, k key, workers, volumes int) error {
	w := d.ways[k.Way]
	lives := func() error {
		return each(workers, d.some(k.FS, volumes), func(v *volume) error {
			_, _, err := b.live(ctx, w, v)
			return err
		})
	}
	began := time.Now()
	if err := lives(); err != nil {
		return err
	}
	k.What = fmt.Sprintf("lives/s, %d at once", workers)
	b.add(k, float64(volumes)/time.Since(began).Seconds())
	time.Sleep(10 * pause)

	vs := d.some(k.FS, volumes)
	if err := each(workers, vs, w.prepare); err != nil {
		return err
	}
	began = time.Now()
	if err := each(workers, vs, func(v *volume) error { return w.publish(ctx, v) }); err != nil {
		return err
	}
	k.What = fmt.Sprintf("published/s, %d at once", workers)
	b.add(k, float64(volumes)/time.Since(began).Seconds())
	if err := b.note(d); err != nil {
		return err
	}
	if err := b.takeAway(ctx, w, vs); err != nil {
		return err
	}
	time.Sleep(10 * pause)
	return ctx.Err()
}

// takeAway unpublishes volumes, 32 at once.
func (b *bench) takeAway(ctx context.Context, w way, vs []*volume) error {
	return each(32, vs, func(v *volume) error {
		if err := w.unpublish(ctx, v); err != nil {
			return err
		}
		return w.tidy(v)
	})
}

// some makes the names of volumes.
func (d *bed) some(fs string, n int) []*volume {
	vs := make([]*volume, n)
	for i := range vs {
		vs[i] = d.volume(fs, volumeSize)
	}
	return vs
}

// each calls f for each volume, so many at once.
func each(workers int, vs []*volume, f func(*volume) error) error {
	var g errgroup.Group
	g.SetLimit(workers)
	for _, v := range vs {
		g.Go(func() error { return f(v) })
	}
	return g.Wait()
}
