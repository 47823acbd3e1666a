// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// key names a series of samples. At is the number of volumes beside which they were measured, on a growth curve.
type key struct {
	Case string `json:"case"`
	Pool string `json:"pool,omitempty"`
	FS   string `json:"fs,omitempty"`
	What string `json:"what"`
	Way  string `json:"way"`
	At   int    `json:"at,omitempty"`
}

// kind is what a formatted image is of.
type kind struct {
	fs   string
	size int64
}

// bench is one run.
type bench struct {
	o                   options
	dir                 string
	began               time.Time
	busyTicks, allTicks float64 // when it began: see others
	rand                *rand.Rand
	loops               indices
	// images are formatted images, from the command format.
	images        map[kind]string
	kernel, accel string // of the VM that formatted them
	peer          *harness.Client

	mu       sync.Mutex
	samples  map[key][]float64
	order    []key // in which they were first measured
	devices  map[int]bool
	seen     map[int]bool // devices that were the plugin's, and new
	failures []string
}

func newBench(o options, dir string) (*bench, error) {
	b := &bench{
		o: o, dir: dir, began: time.Now(), rand: rand.New(rand.NewPCG(o.seed, 0)),
		images: map[kind]string{}, samples: map[key][]float64{}, seen: map[int]bool{},
	}
	b.busyTicks, b.allTicks = ticks()
	var err error
	if b.devices, err = existing(); err != nil {
		return nil, err
	}
	if socket := os.Getenv("BENCH_PEER_SOCKET"); socket != "" {
		if b.peer, err = harness.Connect("unix://" + socket); err != nil {
			return nil, fmt.Errorf("BENCH_PEER_SOCKET: %w", err)
		}
	}
	return b, nil
}

// run measures everything. A case that fails is reported, and the others go on with a new pool.
func (b *bench) run(ctx context.Context) (err error) {
	defer func() {
		if b.peer != nil {
			b.peer.Conn.Close()
		}
		b.removeDevices()
	}()
	if err := b.makeImages(ctx); err != nil {
		return err
	}
	for _, c := range b.wanted("") {
		b.one(ctx, c, &bed{})
	}
	for _, p := range poolKinds {
		if b.o.pools.MatchString(p.name) {
			b.onPool(ctx, p)
		}
	}
	if len(b.failures) > 0 {
		return fmt.Errorf("%d cases failed", len(b.failures))
	}
	return ctx.Err()
}

// onPool runs the cases of one kind of pool. If such a pool cannot be made twice in a row, its other cases are left out.
func (b *bench) onPool(ctx context.Context, p poolKind) {
	failed := 0
	for left := b.wanted(p.name); len(left) > 0 && ctx.Err() == nil && failed < 2; {
		now := b.onBed(ctx, p, left)
		failed++
		if len(now) < len(left) {
			failed = 0
		}
		left = now
	}
}

// wanted are the cases that run on a pool, or, if it is "", before there is one.
func (b *bench) wanted(pool string) []benchCase {
	return slices.DeleteFunc(slices.Clone(cases), func(c benchCase) bool {
		runs := pool != "" && c.pools == nil || c.pools != nil && c.pools.MatchString(pool)
		return !runs || !b.o.cases.MatchString(c.name)
	})
}

// one runs a case, and reports whether it went well.
func (b *bench) one(ctx context.Context, c benchCase, d *bed) bool {
	began := time.Now()
	if err := c.run(ctx, b, d); err != nil {
		b.fail("%s %s: %v", d.kind.name, c.name, err)
		return false
	}
	b.say("%-10s %-8s %5.1f s", d.kind.name, c.name, time.Since(began).Seconds())
	return true
}

// onBed runs cases on one pool until one fails, and returns those that are left.
func (b *bench) onBed(ctx context.Context, p poolKind, left []benchCase) []benchCase {
	d, err := b.newBed(ctx, p)
	defer func() {
		if err := d.close(); err != nil {
			b.fail("%s: cleaning up: %v", p.name, err)
		}
	}()
	if err == nil {
		err = b.warm(ctx, d)
	}
	if err != nil {
		b.fail("%s: %v", p.name, err)
		return left
	}
	for i, c := range left {
		if !b.one(ctx, c, d) {
			return left[i+1:]
		}
	}
	return nil
}

// once makes a volume by a way, and takes it away.
func (b *bench) once(ctx context.Context, d *bed, name string, v *volume) error {
	_, _, err := b.live(ctx, d.ways[name], v)
	if err != nil {
		err = fmt.Errorf("%s of %s: %w", name, v.fs, err)
	}
	return err
}

// live is the life of a volume: how long it took to publish, and to unpublish.
func (b *bench) live(ctx context.Context, w way, v *volume) (published, unpublished time.Duration, err error) {
	if err := w.prepare(v); err != nil {
		return 0, 0, err
	}
	if published, err = timed(ctx, v, w.publish); err != nil {
		return 0, 0, err
	}
	if unpublished, err = timed(ctx, v, w.unpublish); err != nil {
		return 0, 0, err
	}
	return published, unpublished, w.tidy(v)
}

func timed(ctx context.Context, v *volume, f func(context.Context, *volume) error) (time.Duration, error) {
	began := time.Now()
	err := f(ctx, v)
	return time.Since(began), err
}

// add records a sample.
func (b *bench) add(k key, x float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.samples[k]; !ok {
		b.order = append(b.order, k)
	}
	b.samples[k] = append(b.samples[k], x)
}

// n is how often, or how much: quick or not.
func (b *bench) n(full, quick int) int {
	if b.o.quick {
		return quick
	}
	return full
}

// rounds counts so many rounds, and fewer, but not fewer than in a quick run, if they take longer than a limit: on a busy
// machine the run takes no longer, and is less exact.
func (b *bench) rounds(full, quick int, limit time.Duration) iter.Seq[int] {
	return func(yield func(int) bool) {
		began := time.Now()
		for i := range b.n(full, quick) {
			if i >= quick && time.Since(began) > limit || !yield(i) {
				return
			}
		}
	}
}

// shuffled is an order in which the ways take turns.
func (b *bench) shuffled(names []string) []string {
	names = slices.Clone(names)
	b.rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return names
}

// note remembers the loop devices that the plugin's volumes have at the moment, if they were not there before this run.
func (b *bench) note(d *bed) error {
	found, err := d.node.Find()
	for _, name := range found.Loops {
		var index int
		if _, err := fmt.Sscanf(name, "loop%d", &index); err == nil && !b.devices[index] {
			b.seen[index] = true
		}
	}
	return err
}

// removeDevices removes the loop devices that this run has left, its own and the plugin's.
func (b *bench) removeDevices() {
	for _, index := range b.loops.made {
		b.seen[index] = true
	}
	remove(slices.Sorted(maps.Keys(b.seen)))
}

func (b *bench) say(format string, args ...any) {
	fmt.Printf("%6.1f s  "+format+"\n", append([]any{time.Since(b.began).Seconds()}, args...)...)
}

func (b *bench) fail(format string, args ...any) {
	b.failures = append(b.failures, fmt.Sprintf(format, args...))
	fmt.Fprintln(os.Stderr, "FAILED: "+fmt.Sprintf(format, args...))
}

func milliseconds(t time.Duration) float64 { return float64(t.Nanoseconds()) / 1e6 }

var errMissing = errors.New("a program is missing; run hack/setup.sh --bench")
