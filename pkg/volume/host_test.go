// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// hosts are filesystems of nodes, with about 2 GiB.
var hosts = map[string]func(t testing.TB) string{
	"ext4":  func(t testing.TB) string { return testenv.Ext4.Mount(t, 2*gib) },
	"xfs":   func(t testing.TB) string { return testenv.XFS.Mount(t, 2*gib) },
	"btrfs": func(t testing.TB) string { return testenv.Btrfs.Mount(t, 2*gib) },
	"tmpfs": func(t testing.TB) string {
		at := testenv.Tmpfs(t)
		testenv.Run(t, "mount", "-o", "remount,size=2G", at)
		return at
	},
}

// onHosts runs a test on a loopback pool of 20 GiB, on a filesystem of 2 GiB.
func onHosts(t *testing.T, test func(n *node, host string)) {
	testenv.Root(t)
	for name, mount := range hosts {
		t.Run(name, func(t *testing.T) {
			host := mount(t)
			p, err := pool.Open(t.Context(), pool.Config{
				Dir: filepath.Join(host, "pool"), LoopbackSize: 20 * gib, NodeDir: host, NodeHeadroom: size.Share{Bytes: 100 * mib},
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { testenv.Umount(t, p.Root()) })
			test(newNodeOn(t, p, Config{Headroom: size.Share{Percent: 5}}), host)
		})
	}
}

// TestHostFills: a loopback pool promises no more than the node has. When somebody else fills
// the node, thick claims go on, thin ones keep everything that they had synced, and the
// plugin says what is wrong.
func TestHostFills(t *testing.T) {
	onHosts(t, func(n *node, host string) {
		t := n.t
		for _, p := range []image.Provisioning{image.Thin, image.Thick} {
			if most, err := n.Available(p); err != nil || most > 2*gib || most < gib {
				t.Errorf("%s: %s can be promised on 2 GiB: %v", p, size.Format(most), err)
			}
			_, _, err := n.CreateClaim(t.Context(), ClaimRequest{Name: "large", Spec: diskfs.Spec{Filesystem: "ext4", Size: 8 * gib}, Mode: image.ModeFilesystem, Provisioning: p})
			if !errors.Is(err, pool.ErrFull) || !strings.Contains(err.Error(), "below the pool") {
				t.Errorf("%s: a claim of 8 GiB on 2 GiB: %v", p, err)
			}
		}
		thick := n.mustCreate(ClaimRequest{Name: "thick", Spec: diskfs.Spec{Filesystem: "ext4", Size: 200 * mib}, Mode: image.ModeFilesystem, Provisioning: image.Thick})
		disk := n.mustCreate(ClaimRequest{Name: "disk", Spec: diskfs.Spec{Filesystem: "raw", Size: 64 * mib}, Mode: image.ModeBlock, Provisioning: image.Thick})
		thickAt, diskAt := n.mustPublishClaim(thick, "pod"), n.mustPublishClaim(disk, "pod")
		thin, synced := n.thinClaims(300 * mib)
		if h := n.PoolHealth(); len(h) > 0 {
			t.Errorf("before the node is full: %v", h)
		}
		testenv.Fill(t, host)

		if h := n.PoolHealth(); len(h) != 1 || h[0].Code != "PoolFull" || !strings.Contains(h[0].Text, "below the pool") {
			t.Errorf("on a full node: %v", h)
		}
		if most, err := n.Available(image.Thin); err != nil || most != 0 {
			t.Errorf("%s can be promised on a full node: %v", size.Format(most), err)
		}
		if _, err := n.PublishInline(t.Context(), n.request("one-more", "ext4", 64*mib)); !errors.Is(err, pool.ErrFull) || !strings.Contains(err.Error(), "below the pool") {
			t.Errorf("an inline volume on a full node: %v", err)
		}
		n.thickGoesOn(thickAt, diskAt)
		for _, v := range thin {
			safe, err := writeUntilFull(n.target(v.ID+"-pod"), synced[v.ID])
			t.Logf("%s: %d files are safe, then: %v", v.ID, safe, err)
			synced[v.ID] = safe
		}
		n.thickGoesOn(thickAt, diskAt)
		// Writes have failed, and a sync of the pool may say so. The answer stays the same.
		for range 3 {
			if _, err := n.PublishInline(t.Context(), n.request("one-more", "ext4", 64*mib)); !errors.Is(err, pool.ErrFull) {
				t.Errorf("an inline volume on a full node: %v", err)
			}
		}

		if err := os.Remove(filepath.Join(host, "filler")); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "sync", "-f", host)
		for _, v := range thin {
			n.mustUnpublishClaim(v, "pod")
			n.mustUnstage(v.ID)
			testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
			at := n.mustPublishClaim(v, "pod")
			mustHold(t, v.ID, at, synced[v.ID])
			if err := writeSynced(filepath.Join(at, "afterwards"), content(0)); err != nil {
				t.Errorf("%s: with space again: %v", v.ID, err)
			}
			n.mustEnd(v, "pod")
		}
		n.mustEnd(thick, "pod")
		n.mustEnd(disk, "pod")
		if h := n.PoolHealth(); len(h) > 0 {
			t.Errorf("after there was room again: %v", h)
		}
	})
}

// TestHostGetsItsSpaceBack: what volumes have taken of the node is free again when they are
// gone, and what was deleted in them before that.
func TestHostGetsItsSpaceBack(t *testing.T) {
	onHosts(t, func(n *node, host string) {
		t := n.t
		available := func() int64 {
			testenv.Run(t, "sync", "-f", n.pool.Root())
			testenv.Run(t, "sync", "-f", host)
			st, err := fsctl.StatusAt(host)
			if err != nil {
				t.Fatal(err)
			}
			return st.Available
		}
		for _, fs := range diskfs.Names() { // build the templates
			r := n.request("warm-"+fs, fs, 400*mib)
			n.mustPublish(r)
			n.mustUnpublish(r)
		}
		n.mustTrim()
		before := available()
		for _, fs := range diskfs.Names() {
			r := n.request("pod-"+fs, fs, 400*mib)
			n.mustPublish(r)
			for range 3 {
				fillAndEmpty(t, r.Target)
				testenv.Eventually(t, "the space of deleted files", func() bool {
					testenv.Run(t, "sync", "-f", r.Target)
					n.mustTrim()
					return available() > before-160*mib // the log of an xfs is written to
				})
			}
			n.mustUnpublish(r)
			testenv.Eventually(t, "the space of the deleted volume", func() bool { return available() > before-64*mib })
		}
	})
}
