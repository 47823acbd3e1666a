// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// worker is a kubelet with a few pods, which works on volumes of its own.
type worker struct {
	*node
	*ledger
	name string
	rand *rand.Rand
	made int // volumes so far
}

// until repeats a call until it succeeds, as the container orchestrator does. It repeats only the errors of a plugin that
// ends, or that works on the same volume already. There is one exception: once in some thousand kills Linux 6.18 refuses
// to mount a btrfs with EINVAL, and nobody knows the cause. Such a call is undone and says so, and the next one succeeds.
func until(call func() error) error {
	for deadline := time.Now().Add(harness.CallTimeout); ; time.Sleep(3 * time.Millisecond) {
		err := call()
		switch status.Code(err) {
		case codes.OK:
			return nil
		case codes.Unavailable, codes.Aborted, codes.DeadlineExceeded:
		default:
			if !strings.Contains(err.Error(), "mount btrfs on") || !strings.Contains(err.Error(), syscall.EINVAL.Error()) {
				return err
			}
			fmt.Println("repeated:", err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("for %s: %w", harness.CallTimeout, err)
		}
	}
}

// perhaps is true once in n times.
func (w *worker) perhaps(n int) bool { return w.rand.IntN(n) == 0 }

func (w *worker) pause() { time.Sleep(time.Duration(w.rand.IntN(20)) * time.Millisecond) }

// work works until ctx ends, and leaves nothing.
func (w *worker) work(ctx context.Context) error {
	for ctx.Err() == nil {
		life := w.claimLife
		if w.perhaps(2) {
			life = w.inlineLife
		}
		if err := life(); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

func (w *worker) id(kind string) string {
	w.made++
	return fmt.Sprintf("%s-%s-%d", w.name, kind, w.made)
}

var someForms = []struct{ fs, mode string }{
	{"ext4", "filesystem"}, {"xfs", "filesystem"}, {"btrfs", "filesystem"}, {"ext4", "diskImage"}, {"ext4", "block"},
}

// wordPrefix begins every word that a pod writes.
const wordPrefix = "of "

// inlineLife is the life of a pod with an inline volume.
func (w *worker) inlineLife() error {
	form := someForms[w.rand.IntN(4)]
	d := inline(w.id("inline"), form.fs, form.mode)
	w.creating(d)
	unpublish := func() error {
		w.deleting(d)
		if err := until(func() error { return w.unpublish(d) }); err != nil {
			return err
		}
		w.gone(d)
		return os.RemoveAll(w.podDir(d))
	}
	if w.perhaps(4) { // the pod is deleted before its volume was published
		w.publish(d)
		return unpublish()
	}
	if err := until(func() error { return w.publish(d) }); err != nil {
		return err
	}
	w.there(d)
	word := fmt.Sprint(wordPrefix, d.id, w.rand.Uint64())
	if err := w.write(d, word); err != nil {
		return err
	}
	w.pause()
	if err := w.holds(d, word); err != nil {
		return err
	}
	return unpublish()
}

// claimLife is the life of a claim, with one pod after the other.
func (w *worker) claimLife() error {
	form := someForms[w.rand.IntN(len(someForms))]
	d := claim(w.id("claim"), form.fs, form.mode)
	w.creating(d)
	remove := func() error {
		w.deleting(d)
		if err := until(func() error { return w.delete(d) }); err != nil {
			return err
		}
		w.gone(d)
		return nil
	}
	if w.perhaps(6) { // the claim is deleted before it was bound
		w.create(d)
		return remove()
	}
	if err := until(func() error { return w.create(d) }); err != nil {
		return err
	}
	w.there(d)
	word := ""
	for range 1 + w.rand.IntN(3) {
		next := fmt.Sprint(wordPrefix, d.id, w.rand.Uint64())
		if err := w.podLife(d, word, next); err != nil {
			return err
		}
		word = next
	}
	return remove()
}

// podLife is the life of a pod that finds one word in a claim and writes the next.
func (w *worker) podLife(d *disk, word, next string) error {
	if err := until(func() error { return w.stage(d) }); err != nil {
		return err
	}
	if err := until(func() error { return w.publish(d) }); err != nil {
		return err
	}
	if word != "" {
		if err := w.holds(d, word); err != nil {
			return err
		}
	}
	w.writing(d, next)
	if err := w.write(d, next); err != nil {
		return err
	}
	w.written(d, next)
	if w.perhaps(3) {
		if err := w.snapshotLife(d, next); err != nil {
			return err
		}
	}
	if d.fs == "xfs" && d.mode == "filesystem" && w.perhaps(3) {
		larger := d.bytes + 64*mib
		if err := until(func() error { return w.expand(d, larger) }); err != nil {
			return err
		}
		if err := until(func() error { return w.expandOnNode(d, larger) }); err != nil {
			return err
		}
		d.bytes = larger // for its copies, too
	}
	w.pause()
	if err := w.holds(d, next); err != nil {
		return err
	}
	if err := until(func() error { return w.unpublish(d) }); err != nil {
		return err
	}
	return until(func() error { return w.unstage(d) })
}

// snapshotLife is the life of a snapshot, whose copy must hold its word.
func (w *worker) snapshotLife(d *disk, word string) error {
	name := w.id("snap")
	s := w.snapshotting(name, d, word)
	if err := until(func() error { return w.snapshot(name, d) }); err != nil {
		return err
	}
	w.there(s)
	c := copyOf(w.id("copy"), d, name)
	w.creating(c)
	w.written(c, word) // a copy holds it from the start
	if err := until(func() error { return w.create(c) }); err != nil {
		return err
	}
	w.there(c)
	if err := w.podLife(c, word, word+" copied"); err != nil {
		return err
	}
	w.deleting(c)
	if err := until(func() error { return w.delete(c) }); err != nil {
		return err
	}
	w.gone(c)
	w.deleting(s)
	if err := until(func() error { return w.deleteSnapshot(name) }); err != nil {
		return err
	}
	w.gone(s)
	return nil
}

// workers is enough to keep two processors busy.
const workers = 4

// underLoad does something while workers work, and then has them clean up.
func (n *node) underLoad(random *rand.Rand, l *ledger, do func()) {
	n.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	g, ctx := errgroup.WithContext(ctx)
	for i := range workers {
		w := &worker{node: n, ledger: l, name: fmt.Sprint("w", i), rand: rand.New(rand.NewPCG(random.Uint64(), 0))}
		g.Go(func() error { return w.work(ctx) })
	}
	do()
	stop()
	if err := g.Wait(); err != nil {
		n.t.Fatalf("%v\n%s", err, n.Tail())
	}
}

// TestRandomKills kills the plugin again and again while volumes of all kinds come and go: half of the time at a random
// moment, and half of the time between two effects.
func TestRandomKills(t *testing.T) {
	random := seeded(t)
	kills := count(t, 40)
	onPools(t, !thorough, func(n *node) {
		templates, err := os.ReadDir(filepath.Join(n.Pool, "templates"))
		n.must("templates", err)
		l := newLedger()
		n.underLoad(random, l, func() {
			for range kills {
				if random.IntN(2) == 0 {
					n.arm(1+random.IntN(60), "kill")
					select {
					case <-n.Exited():
					case <-time.After(2 * time.Second): // the workers have no work at the moment
					}
				} else {
					// A plugin reads its formatter's files for some tenths of a second before it makes
					// its first volume: some must live longer than that.
					time.Sleep(time.Duration(random.IntN(800)) * time.Millisecond)
				}
				n.kill()
				n.disarm()
				n.start()
			}
		})
		n.mustHave("after all", "")
		if left := l.copy(); len(left) > 0 {
			t.Errorf("the workers left %d volumes and snapshots: %v", len(left), slices.Sorted(maps.Keys(left)))
		}
		if now, err := os.ReadDir(filepath.Join(n.Pool, "templates")); err != nil || len(now) != len(templates) {
			t.Errorf("there were %d templates, there are %d: %v", len(templates), len(now), err)
		}
		t.Logf("killed %d times; %d volumes and snapshots came and went", kills, l.ended)
	})
}
