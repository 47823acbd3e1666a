// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
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

// bench is one run.
type bench struct {
	o     options
	dir   string
	began time.Time
	rand  *rand.Rand
	loops indices
	// images are formatted images, one of each filesystem, from the command format.
	images map[string]string
	peer   *harness.Client

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
		images: map[string]string{}, samples: map[key][]float64{}, seen: map[int]bool{},
	}
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
	if err := b.templates(ctx); err != nil {
		return err
	}
	for _, kind := range poolKinds {
		if b.o.pools.MatchString(kind.name) {
			b.onPool(ctx, kind)
		}
	}
	if len(b.failures) > 0 {
		return fmt.Errorf("%d cases failed", len(b.failures))
	}
	return ctx.Err()
}

// onPool runs the cases of one kind of pool.
func (b *bench) onPool(ctx context.Context, kind poolKind) {
	left := slices.DeleteFunc(slices.Clone(cases), func(c benchCase) bool {
		return c.run == nil || !b.o.cases.MatchString(c.name) || c.pools != nil && !c.pools.MatchString(kind.name)
	})
	for len(left) > 0 && ctx.Err() == nil {
		left = b.onBed(ctx, kind, left)
	}
}

// onBed runs cases on one pool until one fails, and returns those that are left.
func (b *bench) onBed(ctx context.Context, kind poolKind, left []benchCase) []benchCase {
	d, err := b.newBed(ctx, kind)
	defer func() {
		if err := d.close(); err != nil {
			b.fail("%s: cleaning up: %v", kind.name, err)
		}
	}()
	if err == nil {
		err = b.warm(ctx, d)
	}
	if err != nil {
		b.fail("%s: %v", kind.name, err)
		return nil
	}
	for i, c := range left {
		began := time.Now()
		if err := c.run(ctx, b, d); err != nil {
			b.fail("%s on %s: %v", c.name, kind.name, err)
			return left[i+1:]
		}
		b.say("%-10s %-8s %5.1f s", kind.name, c.name, time.Since(began).Seconds())
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
