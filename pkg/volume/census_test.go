// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestCensus counts volumes and what they do, on a pool whose filesystem also has somebody else's loop device.
func TestCensus(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			other := filepath.Join(filepath.Dir(n.pool.Root()), "other")
			kind.Format(t, other, 512*mib)
			at := filepath.Join(testenv.Dir(t), "at")
			if err := os.Mkdir(at, 0o700); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "mount", "-o", "loop", other, at)
			t.Cleanup(func() { testenv.Unmount(t, at) })

			r := n.request("mounted", "ext4", 64*mib)
			n.mustPublish(r)
			block := n.mustCreate(disk("block", 10*mib))
			c, err := n.count()
			if err != nil {
				t.Fatal(err)
			}
			for _, class := range Classes {
				want := 0
				if class == (Class{image.Inline, image.ModeFilesystem}) || class == (Class{image.Claim, image.ModeBlock}) {
					want = 1
				}
				if c.Volumes[class] != want {
					t.Errorf("%+v: %d volumes, expected %d", class, c.Volumes[class], want)
				}
			}
			if c.Loops != 1 || c.Snapshots != 0 {
				t.Errorf("%d loop devices and %d snapshots", c.Loops, c.Snapshots)
			}
			before := n.mustTraffic("mounted")
			if err := os.WriteFile(filepath.Join(r.Target, "file"), make([]byte, mib), 0o600); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "sync", "-f", r.Target)
			after := n.mustTraffic("mounted")
			if did := after.Stats.Minus(before.Stats); did.WrittenBytes < mib || did.Writes == 0 || after.Loop != before.Loop || after.Loop.Number == 0 {
				t.Errorf("it did %+v in the attachments %+v and %+v", did, before.Loop, after.Loop)
			}
			n.mustUnpublish(r)
			n.mustDelete(block.ID)
		})
	}
}

// mustTraffic is what one volume did, which is the only one that is attached.
func (n *node) mustTraffic(id string) Traffic {
	n.t.Helper()
	all, err := n.Traffic()
	if err != nil || len(all) != 1 || all[0].Record.ID != id {
		n.t.Fatalf("%+v, %v", all, err)
	}
	return all[0]
}

// TestCensusIsKept asks again while what was found is kept, and after that: then it is looked at in the background.
func TestCensusIsKept(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	has := func(snapshots, claims int) bool {
		t.Helper()
		c, err := n.Census()
		if err != nil {
			t.Fatal(err)
		}
		return c.Snapshots == snapshots && c.Volumes[Class{image.Claim, image.ModeBlock}] == claims
	}
	if !has(0, 0) {
		t.Error("the first call is not told what there is")
	}
	v := n.mustCreate(disk("v", mib))
	keep := func(until time.Time) {
		n.census.mu.Lock()
		defer n.census.mu.Unlock()
		n.census.is, n.census.until = Census{Snapshots: 7}, until
	}
	keep(time.Now().Add(time.Minute))
	for range 2 {
		if !has(7, 0) {
			t.Error("it was looked at again while it was kept")
		}
	}
	keep(time.Now().Add(-time.Second))
	if !has(7, 0) {
		t.Error("a call waited")
	}
	testenv.Eventually(t, "the claim to be counted", func() bool { return has(0, 1) })
	n.mustDelete(v.ID)
	for took, want := range map[time.Duration]time.Duration{100 * time.Microsecond: 600 * time.Millisecond, 10 * time.Millisecond: time.Minute, time.Hour: time.Minute} {
		if got := rest(took); got != want {
			t.Errorf("what took %s is kept for %s", took, got)
		}
	}
}

// TestSharing has a claim cloned. Both have its space, and the pool has it once.
func TestSharing(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	empty, err := n.pool.Space()
	if err != nil {
		t.Fatal(err)
	}
	v := n.mustCreate(disk("v", 100*mib))
	img, err := n.images.Open(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.File.WriteAt(make([]byte, 64*mib), 0); err != nil {
		t.Fatal(err)
	}
	img.Close()
	if err := n.pool.Sync(); err != nil {
		t.Fatal(err)
	}
	r := disk("copy", 100*mib)
	r.Source.Volume = v.ID
	c := n.mustCreate(r)
	f, err := n.count()
	if err != nil {
		t.Fatal(err)
	}
	// What the filesystem has for itself no image has allocated. It varies a little.
	saved := 64*mib - (empty.Total - empty.Available)
	if f.Allocated != 128*mib || f.Saved < saved-4*mib || f.Saved > saved+4*mib {
		t.Errorf("%+v, expected some %d MiB saved", f, saved/mib)
	}
	n.mustDelete(v.ID, c.ID)
}
