// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// sizesBudget is how long 100 unseen sizes may take. What is not there by then counts as not published.
const sizesBudget = 80 * time.Second

// sizes measures volumes of sizes for which there is no template yet: many at once, and one alone. Then it compares sizes
// that were seen once with the commonest one.
func sizes(ctx context.Context, b *bench, d *bed) error {
	for i := range b.n(5, 2) {
		for j, fs := range filesystems {
			if err := b.oneAlone(ctx, d, d.volume(fs, volumeSize+int64(500+3*i+j)<<20), i == 0); err != nil {
				return err
			}
		}
	}
	if err := d.idle(ctx); err != nil {
		return err
	}
	seen, err := b.unseen(ctx, d)
	if err == nil {
		err = d.idle(ctx)
	}
	if err != nil {
		return err
	}
	return b.onceSeen(ctx, d, seen)
}

// oneAlone publishes a volume of a size for which there is no template. In turns with it a VM boots that only powers off.
// The first template of a filesystem boots a VM too; the later ones restore that one.
func (b *bench) oneAlone(ctx context.Context, d *bed, v *volume, first bool) error {
	took, _, err := b.live(ctx, d.ways[plugin], v)
	if err != nil {
		return fmt.Errorf("one alone, %s: %w", v.fs, err)
	}
	k := key{Case: "sizes", Pool: d.kind.name, FS: v.fs, What: "one alone", Way: plugin}
	if first {
		k.What = "one alone, first"
	}
	b.add(k, milliseconds(took))
	k.Way = floor
	return b.vmFloor(ctx, k)
}

// unseen publishes 100 volumes of different sizes, and returns those that were published in time.
func (b *bench) unseen(ctx context.Context, d *bed) ([]*volume, error) {
	n := b.n(100, 6)
	vs := make([]*volume, n)
	for i := range vs {
		vs[i] = d.volume(filesystems[i%3], volumeSize+int64(100+i)<<20)
	}
	k := key{Case: "sizes", Pool: d.kind.name, Way: plugin}
	w := d.ways[plugin]
	ctx, cancel := context.WithTimeout(ctx, sizesBudget)
	defer cancel()
	began := time.Now()
	done := make([]bool, n)
	var missed atomic.Int64
	var g errgroup.Group
	g.SetLimit(32)
	for i, v := range vs {
		g.Go(func() error {
			if err := w.prepare(v); err != nil {
				return err
			}
			asked := time.Now()
			for w.publish(ctx, v) != nil { // kubelet tries again, too
				if ctx.Err() != nil {
					missed.Add(1)
					return nil
				}
				time.Sleep(50 * time.Millisecond)
			}
			done[i] = true
			b.add(key{k.Case, k.Pool, "", "each waited", plugin, 0}, time.Since(asked).Seconds())
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	k.What = "all published"
	b.add(k, time.Since(began).Seconds())
	k.What = "done"
	b.add(k, float64(n-int(missed.Load())))
	if missed.Load() > 0 {
		// The builds go on without anybody who waits for them, and would disturb the rest.
		d.Kill()
		if err := d.start(context.WithoutCancel(ctx), b.o.binary); err != nil {
			return nil, err
		}
	}
	var seen []*volume
	for i, v := range vs {
		if !done[i] {
			v.csi = nil
			continue
		}
		seen = append(seen, v)
	}
	err := b.takeAway(context.WithoutCancel(ctx), w, seen)
	return seen, err
}

// onceSeen publishes volumes of sizes that were seen once, and of the commonest size, in turns. Of each size the fastest
// of some counts: noise makes the slowest of many sizes look slow, whatever they are.
func (b *bench) onceSeen(ctx context.Context, d *bed, seen []*volume) error {
	if len(seen) < 3 {
		return nil
	}
	slowest, usual := map[string]float64{}, map[string][]float64{}
	for i := 0; i < len(seen); i += max(1, len(seen)/30) {
		fs := seen[i].fs
		var these, common []float64
		for range 5 {
			for _, size := range []int64{seen[i].size, volumeSize} {
				took, _, err := b.live(ctx, d.ways[plugin], d.volume(fs, size))
				if err != nil {
					return err
				}
				if size == volumeSize {
					common = append(common, milliseconds(took))
				} else {
					these = append(these, milliseconds(took))
				}
				time.Sleep(pause)
			}
		}
		slowest[fs] = max(slowest[fs], slices.Min(these))
		usual[fs] = append(usual[fs], slices.Min(common))
	}
	for fs, x := range slowest {
		k := key{Case: "sizes", Pool: d.kind.name, FS: fs, What: "publish, seen", Way: "slowest"}
		b.add(k, x)
		k.Way = "commonest"
		for _, y := range usual[fs] {
			b.add(k, y)
		}
	}
	return nil
}
