// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/loops"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// hidden is a plugin in a mount namespace of its own, where /dev is a tmpfs, with a loopback
// pool. Its mounts are seen only through /proc.
type hidden struct {
	*plugin
	image loops.File // the loopback pool's
}

// seen is the path by which a file in the plugin's mount namespace is seen from here.
func (h *hidden) seen(path string) string { return fmt.Sprintf("/proc/%d/root%s", h.PID(), path) }

// table is the plugin's mount table.
func (h *hidden) table() []*mountinfo.Info {
	h.t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", h.PID()))
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return mounts
}

// volumes lists what the plugin has below kubelet's directory, and the loop devices on files of
// its pool, but those of volumes that are kept ready.
func (h *hidden) volumes() string {
	h.t.Helper()
	var found []string
	for _, m := range h.table() {
		if strings.HasPrefix(m.Mountpoint, h.Kubelet+"/") {
			found = append(found, m.Mountpoint)
		}
	}
	node := harness.Node{Pool: h.seen(filepath.Join(h.Pool, "mnt"))}
	for _, d := range h.devices() {
		ready, err := node.IsReady(d)
		h.must(err)
		if d.Backing != h.image && !ready {
			found = append(found, d.Name)
		}
	}
	return strings.Join(found, " ")
}

// devices lists the loop devices of the pool and of its volumes.
func (h *hidden) devices() []loops.Device {
	h.t.Helper()
	all, err := loops.List()
	if err != nil {
		h.t.Fatal(err)
	}
	return loops.Above(all, h.image)
}

// source is what the mount table shows for a mounted filesystem, or the path of a mounted node.
func (h *hidden) source(at string) string {
	h.t.Helper()
	mounts := h.table()
	i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return m.Mountpoint == at })
	switch {
	case i < 0:
		h.t.Fatalf("nothing is mounted at %s", at)
	case mounts[i].FSType == "devtmpfs":
		return "/dev" + mounts[i].Root
	}
	return mounts[i].Source
}

// mustBeOn checks that what is mounted at a path is on a loop device of the pool.
func (h *hidden) mustBeOn(at string) {
	h.t.Helper()
	source := h.source(at)
	if !slices.ContainsFunc(h.devices(), func(d loops.Device) bool { return "/dev/"+d.Name == source }) {
		h.t.Errorf("the mount table shows %s at %s, and the volumes are on %v", source, at, h.devices())
	}
}

// must ends the test after an error.
func (h *hidden) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// TestOwnDev runs the plugin where /dev is a tmpfs, as in the nodes of kind and minikube: new
// loop devices do not appear in it.
func TestOwnDev(t *testing.T) {
	dir := testenv.Dir(t)
	n := &node{harnesstest.New(t, filepath.Join(dir, "pool")), t}
	if err := os.Mkdir(n.Pool, 0o700); err != nil {
		t.Fatal(err)
	}
	p := n.startWithin(testenv.OwnDev(), "--loopback-pool-size", "2Gi")
	image, err := loops.FileOf(filepath.Join(n.Pool, "pool.img"))
	if err != nil {
		t.Fatal(err)
	}
	h := &hidden{p, image}
	for _, fs := range diskfs.Names() {
		h.inline(fs)
		h.claim(fs)
	}
	h.block()
	if got := harnesstest.Settles(h.volumes, ""); got != "" {
		t.Errorf("the volumes left %s", got)
	}
	if code := p.terminate(); code != 0 {
		t.Errorf("exit code %d after SIGTERM", code)
	}
	// The plugin's mount namespace has ended, and with it the pool's mount.
	testenv.Eventually(t, "the loop devices to go", func() bool { return len(h.devices()) == 0 })
}

func (h *hidden) inline(fs string) {
	h.t.Helper()
	r := h.request("inline-"+fs, fs, "size", "300Mi")
	h.publish(r)
	h.mustBeOn(r.TargetPath)
	h.must(os.WriteFile(filepath.Join(h.seen(r.TargetPath), "file"), []byte("data"), 0o600))
	h.publish(r) // finds it
	h.unpublish(r)
}

// claim uses a claim, a snapshot of it, and what is restored from that: its journal is replayed
// by mounting it. An ext4 that may not grow in use grows by e2fsck and resize2fs.
func (h *hidden) claim(fs string) {
	h.t.Helper()
	ctx := h.t.Context()
	created, err := h.Create(ctx, harness.CreateRequest("claim-"+fs, 300<<20, harness.Mounted(fs), nil))
	h.must(err)
	v := h.Claim(created.VolumeId, harness.Mounted(fs), uidOf("claim-"+fs))
	h.must(v.MakeDirs())
	h.must(h.Stage(ctx, v))
	h.must(h.Publish(ctx, v))
	h.mustBeOn(v.Staging)
	h.mustBeOn(v.Target)
	h.must(os.WriteFile(filepath.Join(h.seen(v.Target), "file"), []byte("data"), 0o600))
	snapshot, err := h.Snapshot(ctx, "snapshot-"+fs, v.ID)
	h.must(err)
	again := harness.CreateRequest("restored-"+fs, 300<<20, harness.Mounted(fs), nil)
	again.VolumeContentSource = harness.FromSnapshot(snapshot.SnapshotId)
	restored, err := h.Create(ctx, again)
	h.must(err)
	h.must(h.Expand(ctx, v.ID, 400<<20))
	h.must(h.Unpublish(ctx, v))
	h.must(h.Unstage(ctx, v))
	h.must(h.Stage(ctx, v)) // and grow, unless it did
	h.must(h.Publish(ctx, v))
	if b, err := os.ReadFile(filepath.Join(h.seen(v.Target), "file")); err != nil || string(b) != "data" {
		h.t.Errorf("%s: the claim has %q: %v", fs, b, err)
	}
	h.must(h.Unpublish(ctx, v))
	h.must(h.Unstage(ctx, v))
	h.must(h.Delete(ctx, v.ID))
	h.must(h.Delete(ctx, restored.VolumeId))
	_, err = h.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshot.SnapshotId})
	h.must(err)
}

func (h *hidden) block() {
	h.t.Helper()
	ctx := h.t.Context()
	created, err := h.Create(ctx, harness.CreateRequest("claim-block", 16<<20, harness.Block(), nil))
	h.must(err)
	v := h.Claim(created.VolumeId, harness.Block(), uidOf("claim-block"))
	h.must(v.MakeDirs())
	h.must(h.Stage(ctx, v))
	h.must(h.Publish(ctx, v))
	h.must(h.Publish(ctx, v))
	h.mustBeOn(v.Target)
	disk, err := os.OpenFile(h.seen(v.Target), os.O_RDWR, 0)
	h.must(err)
	want := bytes.Repeat([]byte("b"), 4096)
	_, err = disk.WriteAt(want, 4096)
	h.must(err)
	h.must(disk.Sync())
	got := make([]byte, 4096)
	if _, err := disk.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		h.t.Errorf("the block volume has other data: %v", err)
	}
	h.must(disk.Close())
	h.must(h.Unpublish(ctx, v))
	h.must(h.Unstage(ctx, v))
	h.must(h.Delete(ctx, v.ID))
}

// TestStartWithoutPermission: a plugin that could attach no volume says so and ends, before it
// promises anything.
func TestStartWithoutPermission(t *testing.T) {
	n := newNode(t, testenv.XFS, 512<<20)
	p := harnesstest.Launch(t, n.Node, harness.Command{
		Binary: testenv.Binary(t), ID: "node-of-test",
		Within: []string{"setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"},
	})
	defer p.Kill()
	select {
	case <-p.Exited():
	case <-time.After(patience):
		t.Fatalf("the plugin runs without CAP_SYS_ADMIN:\n%s", p.Tail())
	}
	t.Log(p.Tail())
	for _, w := range []string{"trial volume", "operation not permitted", "privileged"} {
		if !strings.Contains(p.Tail(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
}
