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
	k.At = n - int(missed.Load())
	k.What = "all published"
	b.add(k, time.Since(began).Seconds())
	k.What = "done"
	b.add(k, float64(k.At))
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

// onceSeen compares sizes that were seen once with the commonest size. A first look finds the size of each filesystem that
// seems the slowest. Of many sizes noise makes one look slow in any case, so that one is measured again, in more turns.
func (b *bench) onceSeen(ctx context.Context, d *bed, seen []*volume) error {
	worst, by := map[string]int64{}, map[string]float64{}
	for i := 0; i < len(seen); i += max(1, len(seen)/30) {
		v := seen[i]
		these, common, err := b.besideCommonest(ctx, d, v.fs, v.size, 5)
		if err != nil {
			return err
		}
		if x := slices.Min(these) / slices.Min(common); x > by[v.fs] {
			worst[v.fs], by[v.fs] = v.size, x
		}
	}
	for fs, size := range worst {
		these, common, err := b.besideCommonest(ctx, d, fs, size, b.n(40, 10))
		if err != nil {
			return err
		}
		for way, samples := range map[string][]float64{"slowest": these, "commonest": common} {
			for _, x := range samples {
				b.add(key{Case: "sizes", Pool: d.kind.name, FS: fs, What: "publish, seen", Way: way}, x)
			}
		}
	}
	return nil
}

// besideCommonest publishes volumes of a size and of the commonest one, in turns, and returns how long each took.
func (b *bench) besideCommonest(ctx context.Context, d *bed, fs string, size int64, turns int) (these, common []float64, err error) {
	took := map[int64][]float64{}
	for i := range 2 * turns {
		now := []int64{size, volumeSize}[i%2]
		published, _, err := b.live(ctx, d.ways[plugin], d.volume(fs, now))
		if err != nil {
			return nil, nil, err
		}
		took[now] = append(took[now], milliseconds(published))
		time.Sleep(pause)
	}
	return took[size], took[volumeSize], nil
}
