// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// waitingFor makes orders from words as "ext4:64Mi". "!" marks one that is to be alone. The word is
// kept as the label.
func waitingFor(words ...string) (orders []*order) {
	sizes := map[string]int64{"s": diskfs.MiB, "h": maxBytes / 2, "xl": maxBytes, "xxl": 2 * maxBytes}
	for _, w := range words {
		fs, size, _ := strings.Cut(strings.TrimSuffix(w, "!"), ":")
		orders = append(orders, &order{
			ctx: context.Background(), alone: strings.HasSuffix(w, "!"), done: make(chan result, 1),
			spec: diskfs.Spec{Filesystem: fs, Size: sizes[size], Label: w},
		})
	}
	return orders
}

func words(orders []*order) string {
	var w []string
	for _, o := range orders {
		w = append(w, o.spec.Label)
	}
	return strings.Join(w, " ")
}

// TestNext decides which orders share a VM.
func TestNext(t *testing.T) {
	many := strings.Fields(strings.Repeat("ext4:s ", 40))
	for name, c := range map[string]struct {
		waiting     []string
		vms         int
		batch, rest string
	}{
		"one":                             {[]string{"ext4:s"}, 2, "ext4:s", ""},
		"a share for each VM":             {[]string{"ext4:s", "ext4:s", "ext4:s", "ext4:s"}, 2, "ext4:s ext4:s", "ext4:s ext4:s"},
		"all for the only VM":             {[]string{"ext4:s", "ext4:s", "ext4:s"}, 1, "ext4:s ext4:s ext4:s", ""},
		"no more than disks":              {many, 2, strings.Join(many[:guest.MaxJobs], " "), strings.Join(many[guest.MaxJobs:], " ")},
		"all of one filesystem":           {[]string{"xfs:s", "ext4:s", "xfs:s", "xfs:s"}, 2, "xfs:s xfs:s xfs:s", "ext4:s"},
		"one filesystem":                  {[]string{"xfs:s", "ext4:s", "xfs:s"}, 1, "xfs:s xfs:s", "ext4:s"},
		"a failed one is alone":           {[]string{"xfs:s!", "xfs:s", "xfs:s"}, 1, "xfs:s!", "xfs:s xfs:s"},
		"nobody gets a failed one":        {[]string{"xfs:s", "xfs:s!", "xfs:s"}, 1, "xfs:s xfs:s", "xfs:s!"},
		"large ones up to the bound":      {[]string{"xfs:h", "xfs:h", "xfs:h"}, 1, "xfs:h xfs:h", "xfs:h"},
		"a small one passes a large one":  {[]string{"xfs:h", "xfs:xl", "xfs:s"}, 1, "xfs:h xfs:s", "xfs:xl"},
		"a very large one has its own VM": {[]string{"xfs:xxl", "xfs:s"}, 1, "xfs:xxl", "xfs:s"},
	} {
		batch, rest := next(waitingFor(c.waiting...), c.vms)
		if words(batch) != c.batch || words(rest) != c.rest {
			t.Errorf("%s: the VM gets %q and %q wait, want %q and %q", name, words(batch), words(rest), c.batch, c.rest)
		}
	}
}

// TestQueue has orders gather while all VMs are busy. One of them leaves.
func TestQueue(t *testing.T) {
	started, end := make(chan []*order), make(chan bool)
	q := queue{vms: 2, run: func(batch []*order) {
		started <- batch
		<-end
	}}
	orders := waitingFor("ext4:s", "ext4:s", "ext4:s", "ext4:s", "ext4:s", "ext4:s")
	var done sync.WaitGroup
	for _, o := range orders {
		done.Go(func() { q.add(o) })
		done.Wait()
	}
	for range 2 {
		if batch := <-started; len(batch) != 1 {
			t.Errorf("a VM that is free gets %d orders, want the first that comes", len(batch))
		}
	}
	if !q.leave(orders[5]) || q.leave(orders[5]) || q.leave(orders[0]) {
		t.Error("an order leaves while it waits, and once")
	}
	select {
	case <-started:
		t.Error("a third VM started")
	case <-time.After(20 * time.Millisecond):
	}
	end <- true
	if batch := <-started; fmt.Sprint(batch) != fmt.Sprint(orders[2:4]) {
		t.Errorf("the next VM gets %v, want %v", batch, orders[2:4])
	}
	end <- true
	if batch := <-started; fmt.Sprint(batch) != fmt.Sprint(orders[4:5]) {
		t.Errorf("the last VM gets %v, want %v", batch, orders[4:5])
	}
	end <- true
	end <- true
}

// TestGivenUp cancels a call that waits for a VM.
func TestGivenUp(t *testing.T) {
	f, err := New(Config{Accel: AccelTCG})
	if err != nil {
		t.Fatal(err)
	}
	f.queue.vms = 0 // none gets free
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer time.AfterFunc(20*time.Millisecond, cancel).Stop()
	_, err = f.Format(ctx, file, diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}, nil, nil)
	if !errors.Is(err, ErrFormat) || !errors.Is(err, context.Canceled) || len(f.queue.waiting) > 0 {
		t.Errorf("%d orders wait, and the call returned %v", len(f.queue.waiting), err)
	}
}

// TestWhileAnybodyWaits checks that a VM goes on as long as one of its callers waits.
func TestWhileAnybodyWaits(t *testing.T) {
	orders := waitingFor("ext4:s", "ext4:s")
	var cancels []context.CancelCauseFunc
	for _, o := range orders {
		ctx, cancel := context.WithCancelCause(t.Context())
		o.ctx, cancels = ctx, append(cancels, cancel)
	}
	ctx, stop := whileAnybodyWaits(orders)
	defer stop()
	cancels[0](errors.New("the first"))
	select {
	case <-ctx.Done():
		t.Error("the VM ended with its first caller")
	case <-time.After(20 * time.Millisecond):
	}
	last := errors.New("the last")
	cancels[1](last)
	<-ctx.Done()
	if got := context.Cause(ctx); got != last {
		t.Errorf("the cause is %v", got)
	}
}

// TestOnceMore decides which orders are done again.
func TestOnceMore(t *testing.T) {
	killed := func(o *outcome) { o.exit = errors.New("signal: killed"); o.noVerdict = guest.ErrNoVerdict }
	shared := func(o *outcome) { o.orders = append(o.orders, o.orders[0]) }
	stuck := func(o *outcome) { o.timedOut, o.stuck = true, true }
	for name, c := range map[string]struct {
		spoil []func(*outcome)
		want  bool
	}{
		"booted and alone": {[]func(*outcome){killed}, false},
		"shared":           {[]func(*outcome){killed, shared}, true},
		"restored":         {[]func(*outcome){killed, func(o *outcome) { o.restored = true }}, true},
		"canceled":         {[]func(*outcome){killed, shared, func(o *outcome) { o.canceled = context.Canceled }}, false},
		"stuck":            {[]func(*outcome){killed, stuck}, true},
		"stuck again":      {[]func(*outcome){killed, stuck, func(o *outcome) { o.orders[0].again = true }}, false},
		"refused by mkfs":  {[]func(*outcome){shared, func(o *outcome) { o.verdict.OK = false }}, false},
		"disk error":       {[]func(*outcome){shared, func(o *outcome) { o.events.ioError = &ioFail{noSpace: true} }}, true},
	} {
		o := good()
		for _, spoil := range c.spoil {
			spoil(&o)
		}
		if err := o.judge(); err == nil || o.onceMore() != c.want {
			t.Errorf("%s: once more: %v, want %v; it is judged %v", name, o.onceMore(), c.want, err)
		}
	}
}
