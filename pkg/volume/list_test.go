// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// listed returns how a volume is listed, or fails. It checks that a description says the same.
func (n *node) listed(id string) Listed {
	n.t.Helper()
	all, err := n.List()
	i := slices.IndexFunc(all, func(v Listed) bool { return v.ID == id })
	if err != nil || i < 0 {
		n.t.Fatalf("%s is not among %+v: %v", id, all, err)
	}
	v, own, err := n.Describe(id)
	if err != nil || own < 0 || own > v.Allocated || fmt.Sprint(v.Published, v.Staged, v.Loops, v.Phase) !=
		fmt.Sprint(all[i].Published, all[i].Staged, all[i].Loops, all[i].Phase) {
		n.t.Errorf("%s is listed as %+v, and described as %+v, %d own: %v", id, all[i], v, own, err)
	}
	return all[i]
}

// mustBeListed compares where a volume is listed with where it is.
func (n *node) mustBeListed(id string, loops int, staged []string, published ...string) {
	n.t.Helper()
	v := n.listed(id)
	if len(v.Loops) != loops || !slices.Equal(v.Staged, staged) || !slices.Equal(v.Published, published) || len(v.Conditions) > 0 {
		n.t.Errorf("%s: %d devices, staged at %v, published at %v, conditions %v", id, len(v.Loops), v.Staged, v.Published, v.Conditions)
	}
}

// TestList follows volumes of all modes through their lives.
func TestList(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 2*gib)
			for i, r := range []ClaimRequest{claim("files", "ext4", 300*size.MiB), disk("disk", 300*size.MiB)} {
				v := n.mustCreate(r)
				n.mustBeListed(v.ID, 0, nil)
				at := n.mustStage(v)
				n.mustBeListed(v.ID, 1, []string{at})
				one, two := n.mustPublishClaim(v, "one"), n.mustPublishClaim(v, "two")
				n.mustBeListed(v.ID, 1, []string{at}, one, two)
				if used := n.listed(v.ID).Used; i == 0 && used <= 0 {
					t.Errorf("%d bytes are used", used)
				}
				n.mustEnd(v, "one", "two")
			}
			r := n.request("inline", "ext4", 300*size.MiB)
			n.mustPublish(r)
			n.mustBeListed(r.ID, 1, nil, r.Target)
			if err := writeSynced(filepath.Join(r.Target, "data"), make([]byte, 20*size.MiB)); err != nil {
				t.Fatal(err)
			}
			if v := n.listed(r.ID); v.Used < 20*size.MiB || v.Allocated < 20*size.MiB || v.Pod.Name != "pod-inline" {
				t.Errorf("%+v", v)
			}
			n.mustBeListedAtItsEnd(r)
			vm := n.request("vm", "ext4", 300*size.MiB)
			vm.Mode = image.ModeDiskImage
			n.mustPublish(vm)
			n.mustBeListed(vm.ID, 0, nil, vm.Target)
			n.mustUnpublish(vm)
			testenv.Eventually(t, "the volume to end", func() bool { return n.Ending() == 0 })
			if _, _, err := n.Describe(vm.ID); !errors.Is(err, errdefs.ErrNotFound) {
				t.Error(err)
			}
		})
	}
}

// mustBeListedAtItsEnd unpublishes a volume that is listed while it ends, and not after that.
func (n *node) mustBeListedAtItsEnd(r InlineRequest) {
	n.t.Helper()
	img, err := n.images.Open(r.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	defer img.Close()
	ended := n.endings.listed(img, func() {}) // as if it took longer
	n.mustUnpublish(r)
	testenv.Eventually(n.t, "the volume to end", func() bool { return n.Ending() == 0 })
	if v := n.listed(r.ID); v.Phase != IsEnding || v.Allocated < 20*size.MiB {
		n.t.Errorf("%+v", v)
	}
	ended()
	if all, err := n.List(); err != nil || len(all) > 0 {
		n.t.Errorf("%+v: %v", all, err)
	}
}

// TestListKept lists a volume whose pod is done, and that is to be committed.
func TestListKept(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, withGoldens(golden.Limits{}))
	r := n.job("done", "ext4")
	n.mustPublish(r)
	n.mustWrite(r, image.CommitMark, "")
	n.keepByHand(r)
	if v := n.listed(r.ID); v.Phase != IsKept || v.Allocated == 0 || v.CommitTo != "cache" {
		t.Errorf("%+v", v)
	}
	if err := n.images.RemoveKept(r.ID); err != nil {
		t.Error(err)
	}
}

// TestListOfSick lists volumes that cannot be read, or that have something wrong with them.
func TestListOfSick(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	v := n.mustCreate(claim("short", "ext4", 300*size.MiB))
	n.mustPublishClaim(v, "pod")
	if err := os.Truncate(n.pool.Volume(v.ID), 200*size.MiB); err != nil {
		t.Fatal(err)
	}
	stray := n.pool.Volume("stray")
	if err := os.WriteFile(stray, []byte("no image"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c := n.listed(v.ID).Conditions; len(c) == 0 || c[0].Code != "BackingImageTruncated" {
		t.Errorf("%+v", c)
	}
	all, err := n.List()
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v: %v", all, err)
	}
	if c := all[1].Conditions; all[1].ID != "stray" || len(c) != 1 || c[0].Code != "HealthUnknown" || !strings.Contains(c[0].Text, stray) {
		t.Errorf("%+v", all[1])
	}
	// A damaged image hides no other one's traffic.
	well, path := n.mustCreate(claim("well", "ext4", 300*size.MiB)), n.pool.Volume(v.ID)
	n.mustPublishClaim(well, "pod")
	record := getRecord(t, path)
	setRecord(t, path, "no JSON")
	n.mustTraffic(well.ID)
	setRecord(t, path, record)
	n.mustEnd(well, "pod")
	if err := os.Remove(stray); err != nil {
		t.Error(err)
	}
	n.mustEnd(v, "pod")
}
