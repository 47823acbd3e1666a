//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// BenchmarkBeside makes each call of a volume's life while few and while a thousand other
// volumes are mounted. p50 and p99 are of the calls of a kind. The pool is in memory, so that no
// disk adds its moods.
func BenchmarkBeside(b *testing.B) {
	for _, others := range []int{10, 1000} {
		n := newNodeInMemory(b)
		n.mustPublish(n.request("warm", "ext4", 300*mib))
		n.mustUnpublish(n.request("warm", "ext4", 300*mib))
		n.each(others, func(r InlineRequest) { n.mustPublish(r) })
		b.Run(fmt.Sprint(others), func(b *testing.B) { n.beside(b) })
		n.each(others, n.mustUnpublish)
	}
}

func newNodeInMemory(b *testing.B) *node {
	dir := testenv.Tmpfs(b)
	testenv.XFS.Format(b, filepath.Join(dir, "image"), 64*gib)
	at := filepath.Join(dir, "fs")
	if err := os.Mkdir(at, 0o700); err != nil {
		b.Fatal(err)
	}
	testenv.Run(b, "mount", "-o", "loop", filepath.Join(dir, "image"), at)
	b.Cleanup(func() { testenv.Umount(b, at) })
	p, err := pool.Open(b.Context(), pool.Config{Dir: filepath.Join(at, "pool")})
	if err != nil {
		b.Fatal(err)
	}
	return newNodeOn(b, p, Config{})
}

// each does something with many inline volumes.
func (n *node) each(count int, do func(InlineRequest)) {
	work := make(chan InlineRequest)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for r := range work {
				do(r)
			}
		})
	}
	for i := range count {
		work <- n.request(fmt.Sprint("other-", i), "ext4", 300*mib)
	}
	close(work)
	wg.Wait()
}

func (n *node) beside(b *testing.B) {
	took := map[string][]time.Duration{}
	timed := func(name string, call func() error) {
		start := time.Now()
		err := call()
		took[name] = append(took[name], time.Since(start))
		if err != nil {
			b.Fatalf("%s: %v", name, err)
		}
	}
	inline, v := n.request("bench", "ext4", 300*mib), claim("bench-claim", "ext4", 300*mib)
	publish := func() error {
		_, err := n.PublishInline(b.Context(), inline)
		return err
	}
	for b.Loop() {
		timed("publish", publish)
		timed("again", publish)
		timed("stats", func() error {
			_, err := n.Stats(inline.ID, inline.Target)
			return err
		})
		timed("unpublish", func() error { return n.Unpublish(inline.ID, inline.Target) })

		made := n.mustCreate(v)
		staging := n.staging(made.ID)
		stage := func() error { return n.Stage(b.Context(), StageRequest{ID: made.ID, Staging: staging}) }
		timed("stage", stage)
		timed("stage-again", stage)
		timed("health", func() error {
			_, err := n.Health(made.ID, staging)
			return err
		})
		timed("unstage", func() error { return n.Unstage(made.ID, staging) })
		timed("delete", func() error { return n.DeleteClaim(made.ID) })
	}
	for name, calls := range took {
		slices.Sort(calls)
		b.ReportMetric(float64(calls[len(calls)/2].Microseconds()), name+"-p50-µs")
		b.ReportMetric(float64(calls[len(calls)*99/100].Microseconds()), name+"-p99-µs")
	}
}
