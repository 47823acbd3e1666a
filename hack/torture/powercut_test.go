// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

// A power cut is a copy of the pool's disk at one moment. The disk is a file on an xfs. FICLONE takes what was written to
// it until then, and nothing that the pool's filesystem still had in memory. Unlike a disk that lies about its cache, it
// keeps writes that nobody has flushed.

// powercut is such a copy, and what must be on it.
type powercut struct {
	image   string
	entries map[string]entry
	goldens map[string]goldenEntry
	built   []string // the contents or labels of templates that were built meanwhile
	fills   bool     // a template that was to be filled at this moment, or later, is asked for
}

// TestPowerCut cuts the power again and again while volumes come and go. Afterwards every volume, snapshot and template
// whose call had answered is there and whole. One whose call had not is there and whole, or missing until the call is
// repeated. A volatile volume is empty, and no other drops flushes. A golden has a generation that is whole: the last
// one whose commit had ended, or a later one. After the power cut nothing is committed of what began before it.
func TestPowerCut(t *testing.T) {
	powerCuts(t, count(t, 12), false)
}

// TestPowerCutInGoldens does the same while only jobs come and go, which start from goldens and commit to them.
func TestPowerCutInGoldens(t *testing.T) {
	powerCuts(t, count(t, 6), true)
}

func powerCuts(t *testing.T, times int, onlyJobs bool) {
	random := seeded(t)
	for _, b := range []base{onXFS.keepingReady(), onBtrfs.keepingReady(), inLoopback.keepingReady()} {
		t.Run(b.name, func(t *testing.T) {
			kind := b.kind
			outside := testenv.Mount(t, 64<<30, "mkfs.xfs", "-q")
			live := filepath.Join(outside, "live")
			kind.Format(t, live, 6<<30)
			at := mount(t, kind, live)
			n := newNode(t, b, at)
			n.race, n.onlyJobs = !thorough, onlyJobs
			n.nameFresh()
			n.start()
			n.warm()
			if !onlyJobs {
				n.warmContents()
			}
			cuts := n.cut(random, outside, live, times)
			n.mustEnd()
			b.unmount(t, at)
			unmount(t, at)
			held := 0
			for i, c := range cuts {
				at := mount(t, kind, c.image)
				held += n.after(at, c, random, fmt.Sprintf("cut %d of %d", i+1, len(cuts)))
				b.unmount(t, at)
				unmount(t, at)
				if err := os.Remove(c.image); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%d power cuts, with %d volumes and snapshots that had to be there; %d volatile ones were made again", len(cuts), held, n.emptied)
			t.Logf("%d goldens had to be there, and %d volumes were found that waited for their commit", n.leftGoldens, n.leftCommits)
			if onlyJobs {
				return
			}
			t.Logf("of contents there were %d blobs; %d templates were built once more", n.leftBlobs, n.unfinished)
			if held == 0 {
				t.Error("there was never anything to lose")
			}
		})
	}
}

// mount mounts an image. Its copies may be mounted, too.
func mount(t *testing.T, kind testenv.Kind, image string) string {
	t.Helper()
	at := testenv.Dir(t)
	options := "loop"
	if kind.Name == "xfs" {
		options += ",nouuid"
	}
	testenv.Run(t, "mount", "-t", kind.Name, "-o", options, image, at)
	t.Cleanup(func() {
		if testenv.IsMounted(t, at) { // a test that failed
			inLoopback.unmount(t, at)
			testenv.Unmount(t, at)
		}
	})
	return at
}

func unmount(t *testing.T, at string) {
	t.Helper()
	testenv.NoLoopsBelow(t, at)
	testenv.Umount(t, at)
}

// cut works on a node and cuts its power so many times.
func (n *node) cut(random *rand.Rand, outside, live string, times int) []powercut {
	n.t.Helper()
	src, err := os.Open(live)
	n.must("the disk", err)
	defer src.Close()
	l := newLedger()
	kept := volatile("kept", "ext4")
	l.creating(kept)
	n.must("a volatile volume", n.run(use(kept, word)...))
	l.there(kept)
	stays := n.markForGood(l)
	testenv.Run(n.t, "sync", "--file-system", n.Pool) // every cut has it, with what was written to it
	var cuts []powercut
	n.underLoad(random, l, func(ctx context.Context) {
		n.whileBuilding(ctx, l, func() {
			for i := 0; i < times && ctx.Err() == nil; i++ { // it ends when a worker fails
				time.Sleep(time.Duration(20+random.IntN(300)) * time.Millisecond)
				if n.onlyJobs { // one job after the other, some of them whole
					time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
				}
				c := powercut{image: filepath.Join(outside, fmt.Sprint("cut-", i)), fills: thorough || i == times-1}
				dst, err := os.OpenFile(c.image, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
				n.must("the copy", err)
				// The ledger stands still: calls that are answered now are entered after the copy.
				c.entries, c.goldens = l.during(func() {
					err = reflink.Clone(dst, src)
					c.built = slices.Clone(l.built)
				})
				n.must("the copy", errors.Join(err, dst.Close()))
				cuts = append(cuts, c)
			}
		})
	})
	n.must("the volatile volume", n.unpublish(kept))
	n.must("a job that ended without the mark", n.run(unmark(stays), unpublish(stays)))
	n.mustHave("after all", "")
	return cuts
}

// after brings a node up after a power cut, checks it, and returns how many volumes and snapshots had to be there.
func (n *node) after(mounted string, c powercut, random *rand.Rand, when string) (held int) {
	n.t.Helper()
	n.Pool, n.race = n.base.pool(mounted), false
	if n.base.loopback { // the power may have been cut while the disk was full; somebody makes room
		if err := os.Remove(n.filler()); err != nil && !errors.Is(err, os.ErrNotExist) {
			n.t.Fatal(err)
		}
	}
	var inlines []*disk
	for _, e := range c.entries {
		if e.disk.inline {
			inlines = append(inlines, e.disk)
		}
	}
	// Kubelet's directory has the pods of this moment, and none of another cut. An inline volume that was unpublished may
	// be there again, but its pod is not.
	n.must(when, os.RemoveAll(filepath.Join(n.Kubelet, "pods")))
	n.must(when, n.Make())
	podsGone := random.IntN(2) == 0
	for _, d := range inlines {
		if !podsGone {
			n.volume(d) // makes its pod's directory
		}
	}
	n.anotherBoot()
	var before []string
	if !n.base.loopback { // the plugin mounts that pool
		before = n.wholeGoldens(when)
		n.leftCommits += len(n.kept())
	}
	n.start()
	if n.base.loopback {
		before = n.wholeGoldens(when)
	}
	n.leftBlobs += len(n.blobs())
	if torn := n.tornBlobs(); torn != nil {
		n.t.Fatalf("%s: %v", when, torn)
	}
	ids := n.claims(when)
	for _, id := range ids {
		if _, known := c.entries[id]; !known {
			n.t.Fatalf("%s: volume %s is there, and was deleted, or never asked for", when, id)
		}
	}
	snapshots := n.snapshots(when)
	for _, id := range snapshots {
		if _, known := c.entries[id]; !known {
			n.t.Fatalf("%s: snapshot %s is there, and was deleted, or never asked for", when, id)
		}
	}
	for id, e := range c.entries {
		if e.state == there && !e.disk.inline {
			held++
			if !slices.Contains(append(ids, snapshots...), id) {
				n.t.Fatalf("%s: %s is lost", when, id)
			}
		}
	}
	if podsGone {
		n.noInline(when, inlines)
	} else {
		for _, d := range inlines { // the pods start again
			n.must(when, n.run(publish(d), flushes(d), born(d)))
			if d.volatile {
				n.must(when, n.lacks(d))
			}
			n.must(when, n.run(write(d, word), unpublish(d)))
		}
	}
	for id, e := range c.entries {
		if e.snapshotOf != nil {
			n.must(when+": "+id, n.afterSnapshot(id, e))
		}
	}
	for id, e := range c.entries {
		if !e.disk.inline && e.snapshotOf == nil {
			n.must(when+": "+id, n.afterClaim(e))
		}
	}
	if now := n.wholeGoldens(when); !slices.Equal(now, before) {
		n.t.Fatalf("%s: there were the goldens %q, and something was committed or lost: there are %q", when, before, now)
	}
	n.leftGoldens += n.mustHaveGoldens(when, c.goldens)
	n.must(when+": templates", n.templatesServe(c.built))
	if !n.onlyJobs {
		n.must(when+": contents", n.afterContents(c))
	}
	n.mustHave(when, "")
	n.kill()
	log, err := os.ReadFile(n.Log)
	n.must(when, err)
	n.unfinished += len(freshBuild.FindAll(log, -1))
	n.emptied += strings.Count(string(log), "The node has rebooted since a volatile volume was made")
	return held
}

// afterSnapshot checks a snapshot by a copy of it, and deletes it.
func (n *node) afterSnapshot(id string, e entry) error {
	if e.state == there {
		c := copyOf("of-"+id, e.snapshotOf, id)
		if err := n.run(then([]step{create(c), stage(c), publish(c), holds(c, e.words...)}, unuse(c)...)...); err != nil {
			return err
		}
	}
	return n.deleteSnapshot(id)
}

// afterClaim repeats the call that was not answered, checks the claim, and deletes it.
func (n *node) afterClaim(e entry) error {
	d := e.disk
	if e.state == deleting || e.state == creating && d.source != nil { // a source may be gone
		return n.delete(d)
	}
	if e.state == creating {
		if err := n.create(d); err != nil {
			return err
		}
	}
	if err := n.run(stage(d), publish(d), flushes(d), born(d)); err != nil {
		return err
	}
	err := n.holds(d, e.words...)
	if err != nil && slices.Contains(e.words, "") && n.untouched(d) {
		err = nil
	}
	if err != nil {
		return err
	}
	return n.run(unuse(d)...)
}

// untouched reports whether no pod has written to a disk. It may be empty, or have what formatting left there. A pod's
// first write may have come as far as making the file.
func (n *node) untouched(d *disk) bool {
	got, err := n.read(d)
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, io.EOF) || err == nil && !strings.HasPrefix(got, wordPrefix)
}

// claims lists the claims that the plugin has.
func (n *node) claims(when string) (ids []string) {
	n.t.Helper()
	list, err := n.ListVolumes(n.t.Context(), &csi.ListVolumesRequest{})
	n.must(when+": listing", err)
	for _, e := range list.Entries {
		ids = append(ids, e.Volume.VolumeId)
	}
	return ids
}

// snapshots lists the snapshots that the plugin has.
func (n *node) snapshots(when string) (ids []string) {
	n.t.Helper()
	list, err := n.ListSnapshots(n.t.Context(), &csi.ListSnapshotsRequest{})
	n.must(when+": listing", err)
	for _, e := range list.Entries {
		ids = append(ids, e.Snapshot.SnapshotId)
	}
	return ids
}

// noInline checks that the sweep at the start deleted the volumes of pods that did not come back.
func (n *node) noInline(when string, inlines []*disk) {
	n.t.Helper()
	for _, d := range inlines {
		if _, err := os.Lstat(filepath.Join(n.Pool, "volumes", d.id)); !errors.Is(err, os.ErrNotExist) {
			n.t.Fatalf("%s: volume %s is there, and its pod is gone: %v", when, d.id, err)
		}
	}
}

// templatesServe returns an error if a template that was built before the power cut is built again.
func (n *node) templatesServe(built []string) error {
	for fs := range sizes {
		d := inline("again-"+fs, fs, "filesystem")
		if err := n.run(publish(d), write(d, word), unpublish(d)); err != nil {
			return err
		}
	}
	return n.builtAgain(built)
}
