// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

const (
	mib = diskfs.MiB
	gib = 1 << 30
)

// with is the same node for a subtest.
func (n *node) with(t testing.TB) *node { return &node{n.Manager, t, n.kubelet} }

// everywhere runs a test for each filesystem on a pool of each kind.
func everywhere(t *testing.T, poolSize int64, test func(n *node, filesystem string)) {
	everywhereWith(t, poolSize, Config{}, test)
}

func everywhereWith(t *testing.T, poolSize int64, c Config, test func(n *node, filesystem string)) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, poolSize, c)
			for _, fs := range diskfs.Names() {
				t.Run(fs, func(t *testing.T) { test(n.with(t), fs) })
			}
		})
	}
}

// claim asks for a mounted filesystem.
func claim(name, filesystem string, size int64) ClaimRequest {
	return ClaimRequest{Name: name, Spec: diskfs.Spec{Filesystem: filesystem, Size: size}, Mode: image.ModeFilesystem}
}

// disk asks for a block volume.
func disk(name string, size int64) ClaimRequest {
	return ClaimRequest{Name: name, Spec: diskfs.Spec{Filesystem: "raw", Size: size}, Mode: image.ModeBlock}
}

func (n *node) mustCreate(r ClaimRequest) image.Record {
	n.t.Helper()
	v, _, err := n.CreateClaim(n.t.Context(), r)
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

func (n *node) mustDelete(ids ...string) {
	n.t.Helper()
	for _, id := range ids {
		if err := n.DeleteClaim(id); err != nil {
			n.t.Error(err)
		}
	}
}

func (n *node) mustSnapshot(name, volume string) image.SnapshotRecord {
	n.t.Helper()
	s, err := n.CreateSnapshot(n.t.Context(), name, volume)
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// staging makes a staging path, as kubelet does.
func (n *node) staging(id string) string {
	n.t.Helper()
	dir := filepath.Join(n.kubelet, "plugins", id, "globalmount")
	// The root of a filesystem that has shut down cannot even be looked at.
	if err := os.MkdirAll(dir, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		n.t.Fatal(err)
	}
	return dir
}

func use(v image.Record) Use { return Use{Block: v.Mode == image.ModeBlock} }

func (n *node) mustStage(v image.Record) string {
	n.t.Helper()
	at := n.staging(v.ID)
	if err := n.Stage(n.t.Context(), StageRequest{ID: v.ID, Staging: at, Use: use(v)}); err != nil {
		n.t.Fatal(err)
	}
	return at
}

func (n *node) mustUnstage(id string) {
	n.t.Helper()
	if err := n.Unstage(id, n.staging(id)); err != nil {
		n.t.Error(err)
	}
}

// publishRequest is for a pod of the given name.
func (n *node) publishRequest(v image.Record, pod string) PublishRequest {
	n.t.Helper()
	return PublishRequest{ID: v.ID, Staging: n.staging(v.ID), Target: n.target(v.ID + "-" + pod), Use: use(v)}
}

// mustPublishClaim publishes for a pod, staging the volume if need be.
func (n *node) mustPublishClaim(v image.Record, pod string) string {
	n.t.Helper()
	r := n.publishRequest(v, pod)
	if err := n.PublishClaim(n.t.Context(), r); err != nil {
		n.t.Fatal(err)
	}
	return r.Target
}

func (n *node) mustUnpublishClaim(v image.Record, pod string) {
	n.t.Helper()
	target := n.target(v.ID + "-" + pod)
	if err := n.Unpublish(v.ID, target); err != nil {
		n.t.Error(err)
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("target %s is still there: %v", target, err)
	}
}

// mustEnd unpublishes a claim from all pods, unstages it, and deletes it.
func (n *node) mustEnd(v image.Record, pods ...string) {
	n.t.Helper()
	for _, pod := range pods {
		n.mustUnpublishClaim(v, pod)
	}
	n.mustUnstage(v.ID)
	n.mustDelete(v.ID)
}

// loops are the devices of a volume.
func (n *node) loops(id string) []int {
	n.t.Helper()
	img, err := n.images.Open(id)
	if err != nil {
		n.t.Fatal(err)
	}
	defer img.Close()
	loops, err := loopdev.Find(img.File)
	if err != nil {
		n.t.Fatal(err)
	}
	return loops
}

// openDisk opens the disk that a pod sees, for direct I/O.
func openDisk(t testing.TB, target string, mode image.Mode, flags int) *os.File {
	t.Helper()
	path := target
	switch mode {
	case image.ModeFilesystem:
		path, flags = filepath.Join(target, "data"), flags|os.O_CREATE
	case image.ModeDiskImage:
		path = filepath.Join(target, image.DiskName)
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// forms are all forms that a claim can have.
var forms = map[string]ClaimRequest{
	"ext4":            claim("", "ext4", 64*mib),
	"xfs":             claim("", "xfs", 300*mib),
	"btrfs":           claim("", "btrfs", 128*mib),
	"disk image":      {Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: image.ModeDiskImage},
	"empty image":     {Spec: diskfs.Spec{Filesystem: "raw", Size: 64 * mib}, Mode: image.ModeDiskImage},
	"block":           disk("", 64*mib),
	"formatted block": {Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib, Label: "inside"}, Mode: image.ModeBlock},
	"thick ext4":      {Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: image.ModeFilesystem, Provisioning: image.Thick},
	"thick block":     {Spec: diskfs.Spec{Filesystem: "raw", Size: 64 * mib}, Mode: image.ModeBlock, Provisioning: image.Thick},
}

// TestClaimLife takes claims of every form through their life, and makes each call twice.
func TestClaimLife(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			for form, r := range forms {
				t.Run(form, func(t *testing.T) {
					r.Name = "life-of-" + strings.ReplaceAll(form, " ", "-")
					n.with(t).claimLife(r)
				})
			}
		})
	}
}

func (n *node) claimLife(r ClaimRequest) {
	t := n.t
	v := n.mustCreate(r)
	if again, res, err := n.CreateClaim(t.Context(), r); err != nil || !res.Existed || again.UUID != v.UUID {
		t.Errorf("created again: %+v %v", res, err)
	}
	if got, err := n.GetClaim(v.ID); err != nil || got.UUID != v.UUID || !got.Spec.Equal(r.Spec) {
		t.Errorf("get %+v: %v", got, err)
	}
	n.mustStage(v)
	staged := n.loops(v.ID)
	if want := map[image.Mode]int{image.ModeFilesystem: 1, image.ModeBlock: 1}[v.Mode]; len(staged) != want {
		t.Errorf("staged on the devices %v", staged)
	}
	n.mustStage(v)

	first := n.mustPublishClaim(v, "first")
	n.mustPublishClaim(v, "first")
	reader := n.publishRequest(v, "reader")
	reader.TargetReadOnly = true
	if err := n.PublishClaim(t.Context(), reader); err != nil {
		t.Fatal(err)
	}
	if err := n.PublishClaim(t.Context(), reader); err != nil {
		t.Error(err)
	}
	writer := reader
	writer.TargetReadOnly = false
	if err := n.PublishClaim(t.Context(), writer); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("publishing writable what is published read-only: %v", err)
	}
	single := n.publishRequest(v, "second")
	single.SingleTarget = true
	if err := n.PublishClaim(t.Context(), single); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), n.kubelet) {
		t.Errorf("a second target, where one is allowed: %v", err)
	}
	n.writeAndReadElsewhere(v, first, reader.Target)

	u, err := n.Stats(v.ID, first)
	if err != nil || u.TotalBytes > r.Spec.Size || u.TotalBytes < r.Spec.Size*6/10 {
		t.Errorf("stats %+v of %d bytes: %v", u, r.Spec.Size, err)
	}
	if h, err := n.Health(v.ID, first); err != nil || len(h) > 0 {
		t.Errorf("health %v: %v", h, err)
	}
	if err := n.Unstage(v.ID, n.staging(v.ID)); v.Mode != image.ModeDiskImage && !errors.Is(err, errdefs.ErrState) {
		t.Errorf("unstaging a published claim: %v", err)
	}
	if err := n.DeleteClaim(v.ID); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("deleting a published claim: %v", err)
	}
	for range 2 {
		n.mustUnpublishClaim(v, "first")
		n.mustUnpublishClaim(v, "reader")
	}
	if err := n.DeleteClaim(v.ID); v.Mode != image.ModeDiskImage && !errors.Is(err, errdefs.ErrState) {
		t.Errorf("deleting a staged claim: %v", err)
	}
	if v.Mode != image.ModeDiskImage {
		n.mustUnstage(v.ID)
		n.mustUnstage(v.ID)
		testenv.Eventually(t, "its loop devices to go", func() bool { return len(n.loops(v.ID)) == 0 })
		if r.Spec.Filesystem != "raw" {
			testenv.Fsck(t, r.Spec.Filesystem, n.pool.Volume(v.ID))
		}
		n.mustDelete(v.ID)
	}
	n.mustDelete(v.ID, v.ID)
	if _, err := n.GetClaim(v.ID); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// writeAndReadElsewhere writes at one target and reads at another, which must refuse
// writes.
func (n *node) writeAndReadElsewhere(v image.Record, writable, readable string) {
	t := n.t
	want := bytes.Repeat([]byte("0123456789abcdef"), 4096/16)
	f := openDisk(t, writable, v.Mode, os.O_RDWR)
	const at = 32 * mib
	if _, err := f.WriteAt(want, at); err != nil {
		t.Error(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Error(err)
	}
	path := filepath.Join(readable, map[image.Mode]string{image.ModeFilesystem: "data", image.ModeDiskImage: image.DiskName}[v.Mode])
	g, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	got := make([]byte, len(want))
	if _, err := g.ReadAt(got, at); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %.16q: %v", got, err)
	}
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil { // a block device may be opened, and refuse the write
		if _, err = w.WriteAt(want, 0); err == nil {
			err = w.Sync()
		}
		w.Close()
	}
	if !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EACCES) {
		t.Errorf("writing to a read-only target: %v", err)
	}
	if v.Mode == image.ModeBlock {
		if fi, err := os.Stat(writable); err != nil || fi.Mode().Type() != os.ModeDevice {
			t.Errorf("the target is %v: %v", fi.Mode(), err)
		}
	}
}

// TestClaimConflicts asks for another volume under a name that is taken.
func TestClaimConflicts(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	r := claim("taken", "ext4", 64*mib)
	v := n.mustCreate(r)
	for name, change := range map[string]func(*ClaimRequest){
		"larger":          func(r *ClaimRequest) { r.Spec.Size = 65 * mib },
		"limited to less": func(r *ClaimRequest) { r.Spec.Size, r.Limit = 0, 63*mib },
		"filesystem":      func(r *ClaimRequest) { r.Spec.Filesystem = "btrfs"; r.Spec.Size = 0 },
		"label":           func(r *ClaimRequest) { r.Spec.Label = "x" },
		"option":          func(r *ClaimRequest) { r.Spec.Options = map[string]string{"journal": "off"} },
		"mode":            func(r *ClaimRequest) { r.Mode = image.ModeDiskImage },
		"thick":           func(r *ClaimRequest) { r.Provisioning = image.Thick },
		"source":          func(r *ClaimRequest) { r.Source.Snapshot = "s" },
	} {
		other := r
		change(&other)
		_, _, err := n.CreateClaim(t.Context(), other)
		if !errors.Is(err, errdefs.ErrExists) {
			t.Errorf("%s: %v", name, err)
		}
		t.Log(err)
	}
	for name, change := range map[string]func(*ClaimRequest){
		"smaller, no limit":  func(r *ClaimRequest) { r.Spec.Size = 10 * mib },
		"within its limit":   func(r *ClaimRequest) { r.Spec.Size, r.Limit = 10*mib, 64*mib },
		"whatever size":      func(r *ClaimRequest) { r.Spec.Size = 0 },
		"the same once more": func(*ClaimRequest) {},
	} {
		same := r
		change(&same)
		if got, res, err := n.CreateClaim(t.Context(), same); err != nil || !res.Existed || got.UUID != v.UUID {
			t.Errorf("%s: %v", name, err)
		}
	}
	inline := n.request("taken", "ext4", 64*mib)
	if _, err := n.PublishInline(t.Context(), inline); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("an inline volume with the id of a claim: %v", err)
	}
	if err := n.Unpublish("taken", inline.Target); err != nil {
		t.Error(err)
	}
	if _, err := n.GetClaim("taken"); err != nil {
		t.Errorf("unpublishing deleted a claim: %v", err)
	}
	inline.ID = "inline"
	n.mustPublish(inline)
	if err := n.Stage(t.Context(), StageRequest{ID: "inline", Staging: n.staging("inline")}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("staging an inline volume: %v", err)
	}
	n.mustDelete("inline") // it is not a claim, so there is nothing to delete
	if err := n.Unpublish("inline", inline.Target); err != nil {
		t.Error(err)
	}
	n.mustDelete("taken")
}

// TestNames checks that any name gets an id that can be a file's name.
func TestNames(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	for _, name := range []string{"pvc-1", "../up", "with / and \t", "名前", strings.Repeat("n", 128), strings.Repeat("é", 64)} {
		r := disk(name, mib)
		v := n.mustCreate(r)
		if image.CheckID(v.ID) != nil || v.ID != r.ID() || v.Name != name {
			t.Errorf("%q became %q", name, v.ID)
		}
		s := n.mustSnapshot(name, v.ID)
		if image.CheckID(s.ID) != nil || s.ID != SnapshotID(name) {
			t.Errorf("%q became %q", name, s.ID)
		}
		if err := n.DeleteSnapshot(s.ID); err != nil {
			t.Error(err)
		}
		n.mustDelete(v.ID)
	}
}

// TestLists pages through volumes and snapshots while they come and go.
func TestLists(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	for i := range 7 {
		v := n.mustCreate(disk(fmt.Sprintf("v-%d", i), mib))
		n.mustSnapshot(fmt.Sprintf("s-%d", i), v.ID)
	}
	n.mustSnapshot("s-extra", "v-3")
	inline := n.request("v-2-inline", "ext4", 64*mib)
	n.mustPublish(inline)
	if err := os.WriteFile(n.pool.Volume("v-4-foreign"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(n.pool.Volume("v-4-foreign"))

	ids := func(limit int, list func(after string, limit int) ([]string, string)) (all []string) {
		after := ""
		for {
			page, next := list(after, limit)
			if limit > 0 && len(page) > limit {
				t.Errorf("%d entries, at most %d were asked for", len(page), limit)
			}
			all = append(all, page...)
			if next == "" {
				return all
			}
			after = next
		}
	}
	volumes := func(after string, limit int) (ids []string, next string) {
		claims, next, err := n.ListClaims(after, limit)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range claims {
			ids = append(ids, c.ID)
		}
		return ids, next
	}
	want := []string{"v-0", "v-1", "v-2", "v-3", "v-4", "v-5", "v-6"}
	for limit := range 9 {
		if got := ids(limit, volumes); !slices.Equal(got, want) {
			t.Errorf("by %d: %v", limit, got)
		}
	}
	for volume, want := range map[string]int{"": 8, "v-3": 2, "v-5": 1, "none": 0} {
		for limit := range 4 {
			got := ids(limit, func(after string, limit int) (ids []string, next string) {
				snaps, next, err := n.ListSnapshots(volume, after, limit)
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range snaps {
					ids = append(ids, s.ID)
				}
				return ids, next
			})
			if len(got) != want {
				t.Errorf("snapshots of %q by %d: %v", volume, limit, got)
			}
		}
	}
	// The entry at which a page ended is deleted.
	_, next := volumes("", 3)
	n.mustDelete("v-2")
	if rest, _ := volumes(next, 0); !slices.Equal(rest, want[3:]) {
		t.Errorf("after %s: %v", next, rest)
	}
	n.mustUnpublish(inline)
	snaps, _, err := n.ListSnapshots("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range snaps {
		if err := n.DeleteSnapshot(s.ID); err != nil {
			t.Error(err)
		}
	}
	n.mustDelete(want...)
	if err := os.Remove(n.pool.Volume("v-4-foreign")); err != nil {
		t.Error(err)
	}
}

// TestReboot removes all mounts and loop devices, as a reboot does, and publishes without
// staging first, as kubelet may.
func TestReboot(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for form, r := range forms {
		t.Run(form, func(t *testing.T) {
			n := n.with(t)
			r.Name = "reboot-" + strings.ReplaceAll(form, " ", "-")
			v := n.mustCreate(r)
			n.mustStage(v)
			target := n.mustPublishClaim(v, "pod")
			f := openDisk(t, target, v.Mode, os.O_RDWR)
			if _, err := f.WriteAt([]byte("kept"), 16*mib); err != nil {
				t.Error(err)
			}
			if err := errors.Join(f.Sync(), f.Close()); err != nil {
				t.Error(err)
			}
			n.reboot(v, target)
			again := n.mustPublishClaim(v, "pod")
			g := openDisk(t, again, v.Mode, os.O_RDWR)
			got := make([]byte, 4)
			if _, err := g.ReadAt(got, 16*mib); err != nil || string(got) != "kept" {
				t.Errorf("after the reboot it holds %q: %v", got, err)
			}
			g.Close()
			n.mustEnd(v, "pod")
		})
	}
}

// reboot removes everything but files and directories, as a reboot does.
func (n *node) reboot(v image.Record, target string) {
	n.t.Helper()
	if v.Mode == image.ModeDiskImage {
		testenv.Run(n.t, "umount", filepath.Join(target, image.DiskName))
	}
	testenv.Run(n.t, "umount", target)
	if v.Mode == image.ModeFilesystem {
		testenv.Run(n.t, "umount", n.staging(v.ID))
	}
	for _, i := range n.loops(v.ID) {
		testenv.Run(n.t, "losetup", "-d", fmt.Sprintf("/dev/loop%d", i))
	}
}

// TestBlockStaysBlock checks that no pod gets a file instead of a device, whatever goes
// wrong.
func TestBlockStaysBlock(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(disk("block", 8*mib))
	n.mustStage(v)
	target := n.mustPublishClaim(v, "pod")
	index := n.loops(v.ID)[0]

	// Kubelet attaches a loop device of its own to the published device, and detaches it
	// again.
	second := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", target))
	n.mustPublishClaim(v, "pod")
	testenv.Run(t, "losetup", "-d", second)
	if got := n.loops(v.ID); len(got) != 1 || got[0] != index {
		t.Errorf("the volume was on loop %d, and is on %v now", index, got)
	}
	// The device stays, though nobody has it open.
	testenv.Run(t, "blockdev", "--getsize64", target)

	// The device is detached by force, so the node at the target belongs to nobody.
	testenv.Run(t, "losetup", "-d", fmt.Sprintf("/dev/loop%d", index))
	n.mustPublishClaim(v, "pod")
	if size := strings.TrimSpace(testenv.Run(t, "blockdev", "--getsize64", target)); size != fmt.Sprint(8*mib) {
		t.Errorf("the device has %s bytes", size)
	}
	n.mustUnpublishClaim(v, "pod")

	// A file with content belongs to somebody.
	r := n.publishRequest(v, "pod")
	if err := os.WriteFile(r.Target, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Unpublish(v.ID, r.Target); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(r.Target); err != nil || string(b) != "precious" {
		t.Errorf("the file has %q: %v", b, err)
	}
	if err := os.Remove(r.Target); err != nil {
		t.Error(err)
	}
	// A directory cannot become a device.
	if err := os.Mkdir(r.Target, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.PublishClaim(t.Context(), r); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("a directory for a target: %v", err)
	}
	if err := os.Remove(r.Target); err != nil {
		t.Error(err)
	}
	// A publish that fails late leaves nothing at the target.
	parent := filepath.Dir(r.Target)
	testenv.Run(t, "mount", "-t", "tmpfs", "-o", "ro", "test", parent)
	if err := n.PublishClaim(t.Context(), r); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a read-only parent: %v", err)
	}
	testenv.Run(t, "umount", parent)
	n.mustUnstage(v.ID)
	n.mustDelete(v.ID)
}

// TestBlockHeldOpen keeps the device open while it is unstaged. The kernel would detach it
// when it is closed, which must not happen under the next pod.
func TestBlockHeldOpen(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(disk("block", 8*mib))
	n.mustPublishClaim(v, "pod")
	held, err := os.Open(fmt.Sprintf("/dev/loop%d", n.loops(v.ID)[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	n.mustUnpublishClaim(v, "pod")
	n.mustUnstage(v.ID)
	if got := n.loops(v.ID); len(got) != 1 {
		t.Fatalf("the device was not held: %v", got)
	}
	target := n.mustPublishClaim(v, "pod")
	held.Close()
	if size := strings.TrimSpace(testenv.Run(t, "blockdev", "--getsize64", target)); size != fmt.Sprint(8*mib) || len(n.loops(v.ID)) != 1 {
		t.Errorf("the pod's device has %s bytes, loop devices %v", size, n.loops(v.ID))
	}
	n.mustEnd(v, "pod")
}

// TestRenamedDevice gives the device of a block volume the name of a volume whose image is
// gone. A pod may do so: LOOP_SET_STATUS64 needs no capability, only write access to the
// device. The inode behind the device tells whose it is.
func TestRenamedDevice(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(disk("block", 8*mib))
	target := n.mustPublishClaim(v, "pod")
	device, err := os.OpenFile(target, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	status, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err == nil {
		clear(status.File_name[:])
		copy(status.File_name[:], "gone")
		err = unix.IoctlLoopSetStatus64(int(device.Fd()), status)
	}
	if err != nil {
		t.Fatal(err)
	}
	device.Close()
	if err := n.Unstage("gone", n.staging("gone")); err != nil {
		t.Error(err)
	}
	if err := n.Unpublish("gone", target); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("another volume's target: %v", err)
	}
	n.mustSweep(sweep.Options{})
	if got := n.loops(v.ID); len(got) != 1 {
		t.Errorf("the device was taken for the other volume's: %v", got)
	}
	if _, err := os.ReadFile(target); err != nil {
		t.Error(err)
	}
	n.mustEnd(v, "pod")
}

// TestSingleTargetAgain publishes a volume again at its target, as kubelet does after a
// restart. By then kubelet has bound the volume elsewhere as well: a device for its
// container, a directory for subPath.
func TestSingleTargetAgain(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	for _, r := range []ClaimRequest{disk("block", 8*mib), claim("filesystem", "ext4", 64*mib)} {
		v := n.mustCreate(r)
		p := n.publishRequest(v, "pod")
		p.SingleTarget = true
		if err := n.PublishClaim(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		bound := filepath.Join(n.kubelet, "bound-by-kubelet-"+v.ID)
		if v.Mode == image.ModeBlock {
			if err := os.WriteFile(bound, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Mkdir(bound, 0o700); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "mount", "--bind", p.Target, bound)
		if err := n.PublishClaim(t.Context(), p); err != nil {
			t.Errorf("%s: published again: %v", v.ID, err)
		}
		other := n.publishRequest(v, "other")
		other.SingleTarget = true
		if err := n.PublishClaim(t.Context(), other); !errors.Is(err, errdefs.ErrState) {
			t.Errorf("%s: published elsewhere: %v", v.ID, err)
		}
		testenv.Run(t, "umount", bound)
		n.mustEnd(v, "pod")
	}
}

// TestLockedByPod locks a disk.img, as QEMU in a pod may. Copies do not wait for that lock.
func TestLockedByPod(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(ClaimRequest{Name: "image", Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage})
	f, err := os.Open(filepath.Join(n.mustPublishClaim(v, "pod"), image.DiskName))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s := n.mustSnapshot("s", v.ID)
	c := n.mustCreate(from("copy", v, image.Source{Volume: v.ID}))
	f.Close()
	n.mustEnd(v, "pod")
	n.mustDelete(c.ID)
	if err := n.DeleteSnapshot(s.ID); err != nil {
		t.Error(err)
	}
}

// TestNameTakenMeanwhile checks that a create that fails because another one was faster
// leaves the other's volume alone.
func TestNameTakenMeanwhile(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	source := disk("source", 256*mib)
	source.Provisioning = image.Thick
	from := n.mustCreate(source)
	if err := writeSynced(n.mustPublishClaim(from, "pod"), bytes.Repeat([]byte{'x'}, 256*mib)); err != nil {
		t.Fatal(err)
	}
	slow := source
	slow.Name, slow.Source = "taken", image.Source{Volume: from.ID}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if _, _, err := n.CreateClaim(ctx, slow); !errors.Is(err, errdefs.ErrUnderWay) {
		t.Fatalf("the slow create: %v", err)
	}
	fast := n.mustCreate(disk("taken", 8*mib))
	n.work.wait.Wait()
	if got, err := n.GetClaim("taken"); err != nil || !got.Created.Equal(fast.Created) {
		t.Errorf("the volume of the fast create is gone: %v", err)
	}
	n.mustEnd(from, "pod")
	n.mustDelete("taken")
}

// TestStagedElsewhere checks that a mount at the staging path that is not the volume's is
// left alone.
func TestStagedElsewhere(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("mine", "ext4", 64*mib))
	at := n.staging(v.ID)
	testenv.Run(t, "mount", "-t", "tmpfs", "somebody-elses", at)
	r := StageRequest{ID: v.ID, Staging: at}
	if err := n.Stage(t.Context(), r); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("staging there: %v", err)
	}
	if err := n.Unstage(v.ID, at); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("unstaging there: %v", err)
	}
	if got := findmnt(t, "SOURCE", at); got != "somebody-elses" {
		t.Errorf("the other mount is %q now", got)
	}
	testenv.Run(t, "umount", at)

	for name, bad := range map[string]StageRequest{
		"no directory":   {ID: v.ID, Staging: filepath.Join(n.kubelet, "missing")},
		"outside":        {ID: v.ID, Staging: "/var/tmp"},
		"relative":       {ID: v.ID, Staging: "staging"},
		"another fsType": {ID: v.ID, Staging: at, Use: Use{Filesystem: "xfs"}},
		"as a device":    {ID: v.ID, Staging: at, Use: Use{Block: true}},
		"unknown":        {ID: "unknown", Staging: at},
	} {
		err := n.Stage(t.Context(), bad)
		if err == nil {
			t.Errorf("%s: staged", name)
		}
		t.Logf("%s: %v", name, err)
	}
	// A capability may be read-only for all pods.
	r.Access.ReadOnly = true
	if err := n.Stage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "file"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("writing to a volume that is staged read-only: %v", err)
	}
	r.Access.ReadOnly = false
	if err := n.Stage(t.Context(), r); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("staging writable what is staged read-only: %v", err)
	}
	n.mustEnd(v)
}

// TestMountFlags checks the mount options of the target.
func TestMountFlags(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("flags", "ext4", 64*mib))
	for _, access := range []image.Access{{}, {SUID: true, Dev: true}, {NoExec: true, NoATime: true}, {ReadOnly: true}} {
		r := n.publishRequest(v, "pod")
		r.Access = access
		if err := n.PublishClaim(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		options := strings.Split(findmnt(t, "VFS-OPTIONS", r.Target), ",")
		for word, want := range map[string]bool{
			"ro": access.ReadOnly, "nosuid": !access.SUID, "nodev": !access.Dev, "noexec": access.NoExec, "noatime": access.NoATime,
		} {
			if slices.Contains(options, word) != want {
				t.Errorf("%s: %s in %v", access, word, options)
			}
		}
		n.mustUnpublishClaim(v, "pod")
		n.mustUnstage(v.ID)
	}
	n.mustDelete(v.ID)
}

// TestTornClaim has the image that a power cut may leave of a claim that no call has
// returned yet.
func TestTornClaim(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	r := claim("torn", "ext4", 64*mib)
	v := n.mustCreate(r)
	if err := os.Truncate(n.pool.Volume(v.ID), 0); err != nil {
		t.Fatal(err)
	}
	if err := n.Stage(t.Context(), StageRequest{ID: v.ID, Staging: n.staging(v.ID)}); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("staging it: %v", err)
	} else {
		t.Log(err)
	}
	again, res, err := n.CreateClaim(t.Context(), r)
	if err != nil || res.Existed || again.UUID == v.UUID {
		t.Errorf("created again: %+v %v", res, err)
	}
	n.mustStage(again)
	n.mustEnd(again)
}

// TestRepeatedCreate checks that a repeated CreateVolume never makes the volume anew,
// whatever its pod has done to it.
func TestRepeatedCreate(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	for name, r := range map[string]ClaimRequest{
		"ext4": claim("ext4", "ext4", 64*mib), "block": disk("block", 8*mib),
		"image": {Name: "image", Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage},
	} {
		v := n.mustCreate(r)
		at := n.mustPublishClaim(v, "pod")
		switch v.Mode {
		case image.ModeFilesystem:
			if err := writeSynced(filepath.Join(at, numbered(0)), content(0)); err != nil {
				t.Error(err)
			}
		case image.ModeBlock: // all zeros look like an empty volume
			if err := os.WriteFile(at, make([]byte, 8*mib), 0); err != nil {
				t.Error(err)
			}
		case image.ModeDiskImage: // another, smaller image
			if err := os.WriteFile(filepath.Join(at, image.DiskName), bytes.Repeat([]byte("small..."), mib/8), 0o600); err != nil {
				t.Error(err)
			}
		}
		n.mustUnpublishClaim(v, "pod")
		n.mustUnstage(v.ID)
		if v.Mode == image.ModeFilesystem { // an administrator may do this
			testenv.Run(t, "tune2fs", "-U", "random", n.pool.Volume(v.ID))
		}
		want := readAll(t, n.pool.Volume(v.ID))
		got, res, err := n.CreateClaim(t.Context(), r)
		if err != nil || !res.Existed || !got.Created.Equal(v.Created) {
			t.Errorf("%s: %+v %v", name, res, err)
		}
		snap := n.mustSnapshot("s", v.ID)
		if again := n.mustSnapshot("s", v.ID); !again.Created.Equal(snap.Created) {
			t.Errorf("%s: the snapshot was made again", name)
		}
		if !bytes.Equal(readAll(t, n.pool.Volume(v.ID)), want) {
			t.Errorf("%s: its content has changed", name)
		}
		n.mustPublishClaim(v, "pod")
		n.mustEnd(v, "pod")
		if err := n.DeleteSnapshot(snap.ID); err != nil {
			t.Error(err)
		}
	}
}

// readAll reads a device or a file to its end.
func readAll(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// BenchmarkClaim makes a claim durably, and publishes it to its first pod, alone and beside a
// thousand other claims.
func BenchmarkClaim(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, others := range []int{0, 1000} {
			n := newNode(b, kind, 64*gib)
			for i := range others {
				n.mustCreate(disk(fmt.Sprintf("other-%d", i), mib))
			}
			warm := n.mustCreate(claim("warm", "ext4", 300*mib))
			n.mustDelete(warm.ID)
			name := fmt.Sprintf("%s-pool/beside-%d", kind.Name, others)
			b.Run(name+"/create", func(b *testing.B) {
				for b.Loop() {
					v := n.mustCreate(claim("bench", "ext4", 300*mib))
					b.StopTimer()
					n.mustDelete(v.ID)
					b.StartTimer()
				}
			})
			b.Run(name+"/stage-and-publish", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					v := n.mustCreate(claim("bench", "ext4", 300*mib))
					b.StartTimer()
					n.mustPublishClaim(v, "pod")
					b.StopTimer()
					n.mustEnd(v, "pod")
					b.StartTimer()
				}
			})
			for i := range others {
				n.mustDelete(fmt.Sprintf("other-%d", i))
			}
		}
	}
}

// BenchmarkSnapshot takes a snapshot of a mounted filesystem with 64 MiB in it, and
// makes a volume of it.
func BenchmarkSnapshot(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, fs := range diskfs.Names() {
			n := newNode(b, kind, 64*gib)
			v := n.mustCreate(claim("source", fs, 300*mib))
			if err := writeSynced(filepath.Join(n.mustPublishClaim(v, "pod"), "data"), bytes.Repeat([]byte{'x'}, 64*mib)); err != nil {
				b.Fatal(err)
			}
			name := fmt.Sprintf("%s-pool/%s", kind.Name, fs)
			b.Run(name+"/snapshot", func(b *testing.B) {
				for b.Loop() {
					s := n.mustSnapshot("s", v.ID)
					b.StopTimer()
					if err := n.DeleteSnapshot(s.ID); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
			s := n.mustSnapshot("s", v.ID)
			b.Run(name+"/restore", func(b *testing.B) {
				for b.Loop() {
					r := n.mustCreate(from("restored", v, image.Source{Snapshot: s.ID}))
					b.StopTimer()
					n.mustDelete(r.ID)
					b.StartTimer()
				}
			})
			if err := n.DeleteSnapshot(s.ID); err != nil {
				b.Fatal(err)
			}
			n.mustEnd(v, "pod")
		}
	}
}
