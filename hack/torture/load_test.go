// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"context"
	"errors"
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
//
// While a neighbour fills the node's disk, calls may also fail for want of space.
func (n *node) until(call func() error) error {
	for deadline := time.Now().Add(harness.CallTimeout); ; time.Sleep(3 * time.Millisecond) {
		err := call()
		switch status.Code(err) {
		case codes.OK:
			return nil
		case codes.Unavailable, codes.Aborted, codes.DeadlineExceeded:
		default:
			if n.base.loopback && wantsSpace(err) {
				break
			}
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
		life := []func() error{w.claimLife, w.claimLife, w.inlineLife, w.inlineLife, w.jobLife}[w.rand.IntN(5)]
		if w.onlyJobs {
			life = w.jobLife
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

// perhapsBorn has some disks be born with a content whose template is there.
func (w *worker) perhapsBorn(d *disk) {
	switch {
	case !w.perhaps(3):
	case d.mode == "filesystem" && d.fs == "ext4":
		with("files", d)
	case d.mode != "filesystem":
		with([]string{"disk", "vm"}[w.rand.IntN(2)], d)
	}
}

// wordPrefix begins every word that a pod writes.
const wordPrefix = "of "

// inlineLife is the life of a pod with an inline volume.
func (w *worker) inlineLife() error {
	form := someForms[w.rand.IntN(4)]
	d := inline(w.id("inline"), form.fs, form.mode)
	d.volatile = form.mode == "filesystem" && w.perhaps(2)
	w.perhapsBorn(d)
	w.creating(d)
	unpublish := func() error {
		w.deleting(d)
		if err := w.until(func() error { return w.unpublish(d) }); err != nil {
			return err
		}
		w.gone(d)
		return os.RemoveAll(w.podDir(d))
	}
	if w.perhaps(4) { // the pod is deleted before its volume was published
		w.publish(d)
		return unpublish()
	}
	if err := w.until(func() error { return w.publish(d) }); err != nil {
		return err
	}
	w.there(d)
	word := fmt.Sprint(wordPrefix, d.id, w.rand.Uint64())
	err := errors.Join(w.flushes(d), w.born(d))
	if err == nil {
		err = w.write(d, word)
	}
	if err == nil {
		err = w.born(d)
	}
	if err == nil {
		w.pause()
		err = w.holds(d, word)
	}
	if err != nil && !(w.base.loopback && wantsSpace(err)) { // else the pod has failed, and is deleted
		return err
	}
	return unpublish()
}

// claimLife is the life of a claim, with one pod after the other.
func (w *worker) claimLife() error {
	form := someForms[w.rand.IntN(len(someForms))]
	d := claim(w.id("claim"), form.fs, form.mode)
	d.thick = w.base.loopback && w.perhaps(2)
	w.perhapsBorn(d)
	w.creating(d)
	remove := func() error {
		w.deleting(d)
		if err := w.until(func() error { return w.delete(d) }); err != nil {
			return err
		}
		w.gone(d)
		return nil
	}
	if w.perhaps(6) { // the claim is deleted before it was bound
		w.create(d)
		return remove()
	}
	if err := w.until(func() error { return w.create(d) }); err != nil {
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
	if err := w.use(d); err != nil {
		return err
	}
	if err := w.insist(d, func() error { return w.born(d) }); err != nil {
		return err
	}
	if word != "" {
		if err := w.insist(d, func() error { return w.holds(d, word) }); err != nil {
			return err
		}
	}
	w.writing(d, next)
	// The word before is there, too, until the new one is.
	if err := w.insist(d, func() error { return w.write(d, next) }, word, next); err != nil {
		return err
	}
	w.written(d, next)
	if w.perhaps(3) {
		if err := w.snapshotLife(d, next); err != nil {
			return err
		}
	}
	if d.fs == "xfs" && d.mode == "filesystem" && !w.base.loopback && w.perhaps(3) {
		larger := d.bytes + 64*mib
		if err := w.until(func() error { return w.expand(d, larger) }); err != nil {
			return err
		}
		if err := w.until(func() error { return w.expandOnNode(d, larger) }); err != nil {
			return err
		}
		d.bytes = larger // for its copies, too
	}
	w.pause()
	if err := w.insist(d, func() error { return w.holds(d, next) }); err != nil {
		return err
	}
	return w.release(d)
}

// use has a pod get a claim, and release has it let go.
func (w *worker) use(d *disk) error {
	if err := w.until(func() error { return w.stage(d) }); err != nil {
		return err
	}
	if err := w.until(func() error { return w.publish(d) }); err != nil {
		return err
	}
	return w.flushes(d)
}

func (w *worker) release(d *disk) error {
	if err := w.until(func() error { return w.unpublish(d) }); err != nil {
		return err
	}
	return w.until(func() error { return w.unstage(d) })
}

// insist has a pod read or write a claim. While a neighbour fills the node's disk, that fails for thin claims, and their
// filesystem may give up. The next pod gets it mounted anew, and tries again. Until then the claim must hold one of the
// words. A thick claim is never affected.
func (w *worker) insist(d *disk, do func() error, words ...string) error {
	for deadline := time.Now().Add(harness.CallTimeout); ; {
		err := do()
		if err == nil {
			return nil
		}
		if !w.base.loopback || d.thick || !wantsSpace(err) || time.Now().After(deadline) {
			return fmt.Errorf("%s: %w", d, err)
		}
		w.setbacks.Add(1)
		if err := w.release(d); err != nil {
			return err
		}
		if err := w.use(d); err != nil {
			return err
		}
		if words == nil {
			continue
		}
		if err := w.holds(d, words...); err != nil && !wantsSpace(err) && !(slices.Contains(words, "") && w.untouched(d)) {
			return fmt.Errorf("after its filesystem was mounted anew: %w", err)
		}
	}
}

// wantsSpace reports whether an error may come from a full disk.
func wantsSpace(err error) bool {
	switch status.Code(err) {
	case codes.ResourceExhausted, codes.FailedPrecondition:
		return true
	}
	for _, e := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS} {
		if strings.Contains(err.Error(), e.Error()) {
			return true
		}
	}
	return false
}

// snapshotLife is the life of a snapshot, whose copy must hold its word.
func (w *worker) snapshotLife(d *disk, word string) error {
	name := w.id("snap")
	s := w.snapshotting(name, d, word)
	remove := func() error {
		w.deleting(s)
		if err := w.until(func() error { return w.deleteSnapshot(name) }); err != nil {
			return err
		}
		w.gone(s)
		return nil
	}
	if w.base.loopback { // its volume may have given up; then there is no snapshot until that is mounted anew
		if err := w.snapshot(name, d); err != nil {
			return remove()
		}
	} else if err := w.until(func() error { return w.snapshot(name, d) }); err != nil {
		return err
	}
	w.there(s)
	c := copyOf(w.id("copy"), d, name)
	w.creating(c)
	w.written(c, word) // a copy holds it from the start
	if err := w.until(func() error { return w.create(c) }); err != nil {
		return err
	}
	w.there(c)
	if err := w.podLife(c, word, word+" copied"); err != nil {
		return err
	}
	w.deleting(c)
	if err := w.until(func() error { return w.delete(c) }); err != nil {
		return err
	}
	w.gone(c)
	return remove()
}

// fillsDisk is a neighbour on the node who fills its disk, for a moment, now and then.
func (n *node) fillsDisk(ctx context.Context, random *rand.Rand) (times int, err error) {
	path := n.filler()
	for ctx.Err() == nil {
		time.Sleep(time.Duration(50+random.IntN(800)) * time.Millisecond)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return times, err
		}
		var at int64
		for size := int64(1) << 30; size >= 4096; size /= 2 {
			for syscall.Fallocate(int(f.Fd()), 0, at, size) == nil {
				at += size
			}
		}
		time.Sleep(time.Duration(50+random.IntN(400)) * time.Millisecond)
		if err := errors.Join(f.Close(), os.Remove(path)); err != nil {
			return times, err
		}
		times++
	}
	return times, nil
}

// filler is the file of the neighbour who fills the disk that the pool's file is on.
func (n *node) filler() string { return filepath.Join(n.Pool, "..", "..", "filler") }

// workers is enough to keep two processors busy.
const workers = 4

// underLoad does something while workers work, and then has them clean up. Its context ends when a worker fails.
func (n *node) underLoad(random *rand.Rand, l *ledger, do func(ctx context.Context)) {
	n.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	g, ctx := errgroup.WithContext(ctx)
	if n.base.loopback {
		neighbour := rand.New(rand.NewPCG(random.Uint64(), 0))
		g.Go(func() error {
			times, err := n.fillsDisk(ctx, neighbour)
			n.t.Logf("a neighbour filled the disk %d times; %d times a claim could not be used", times, n.setbacks.Load())
			return err
		})
	}
	for i := range workers {
		w := &worker{node: n, ledger: l, name: fmt.Sprint("w", i), rand: rand.New(rand.NewPCG(random.Uint64(), 0))}
		g.Go(func() error { return w.work(ctx) })
	}
	do(ctx)
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
		n.warmContents()
		templates := n.templates()
		l := newLedger()
		n.underLoad(random, l, func(ctx context.Context) {
			for range kills {
				if ctx.Err() != nil { // a worker has failed
					return
				}
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
		goldens := n.mustHaveGoldens("after all", l.goldens) // each has its last generation
		if now := n.templates(); !slices.Equal(now, templates) {
			t.Errorf("there were the templates %v, there are %v", templates, now)
		}
		t.Logf("killed %d times; %d volumes and snapshots came and went", kills, l.ended)
		t.Logf("of %d goldens %d generations were made", goldens, l.commits)
	}, onXFS.keepingReady(), onBtrfs.keepingReady(), inLoopback.keepingReady())
}
