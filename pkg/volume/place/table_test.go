// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

func TestPodHome(t *testing.T) {
	for rel, want := range map[string]string{
		"pods/u1/volumes/kubernetes.io~csi/v/mount": "pods/u1",
		"pods/u1/v":         "pods/u1",
		"pods/u1":           "",
		"pods":              "",
		"pods//v":           "",
		"plugins/u1/v":      "",
		"x/pods/u1/v/mount": "",
		"":                  "",
	} {
		if got := podDir(rel); got != want {
			t.Errorf("%q: %q, expected %q", rel, got, want)
		}
	}
}

// TestTabulate finds the mounts of loop devices and disk images in a mount table.
func TestTabulate(t *testing.T) {
	table := tabulate([]entry{
		{at: "/a", source: "/dev/loop3", fsType: "ext4", root: "/"},
		{at: "/b", source: "/dev/loop3", fsType: "ext4", root: "/sub"},
		{at: "/c", source: "devtmpfs", fsType: "devtmpfs", root: "/loop4"},
		{at: "/dev", source: "devtmpfs", fsType: "devtmpfs", root: "/"},
		{at: "/p", source: "/dev/loop3p1", fsType: "ext4", root: "/"},
		{at: "/d", source: "csi-disktemplate:img", fsType: "tmpfs", root: "/"},
		{at: "/e", source: "csi-disktemplate:../../etc", fsType: "tmpfs", root: "/"},
		{at: "/f", source: "csi-disktemplate:img", fsType: "ext4", root: "/"},
		{at: "/g", source: "csi-other:img", fsType: "tmpfs", root: "/"},
	})
	if !slices.Equal(table.ByLoop[3], []string{"/a", "/b"}) || !slices.Equal(table.ByLoop[4], []string{"/c"}) || len(table.ByLoop) != 2 {
		t.Errorf("loop devices %v", table.ByLoop)
	}
	if len(table.Disks) != 1 || table.Disks[0].At != "/d" || table.Disks[0].ID != "img" {
		t.Errorf("disk images %v", table.Disks)
	}
	for r, want := range map[*image.Record]string{
		{ID: "v", Mode: image.ModeFilesystem}:    "/a /b /c",
		{ID: "img", Mode: image.ModeDiskImage}:   "/a /b /c /d",
		{ID: "img", Mode: image.ModeFilesystem}:  "/a /b /c",
		{ID: "other", Mode: image.ModeDiskImage}: "/a /b /c",
	} {
		if got := strings.Join(table.Of(*r, []int{3, 4}), " "); got != want {
			t.Errorf("%+v: %s, expected %s", *r, got, want)
		}
	}
}

// FuzzMountTable checks that a mount counts as a volume's only if it names the volume's loop
// device or disk image, letter by letter, whatever else is mounted.
func FuzzMountTable(f *testing.F) {
	f.Add("22 1 7:3 / /k/pods/u/v rw - ext4 /dev/loop3 rw\n23 1 0:5 /loop4 /k/p rw - devtmpfs devtmpfs rw\n24 1 0:30 / /k/t ro - tmpfs csi-disktemplate:img rw\n")
	f.Add("22 1 7:3 / /a\\040b rw shared:1 - xfs /dev/loop03 rw\n24 1 0:30 / /k ro - tmpfs csi-disktemplate:../x rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(text), nil)
		if err != nil {
			return
		}
		var entries []entry
		for _, m := range mounts {
			entries = append(entries, entry{at: m.Mountpoint, root: m.Root, fsType: m.FSType, source: m.Source})
		}
		table := tabulate(entries)
		named := func(at string, source func(entry) bool) bool {
			return slices.ContainsFunc(entries, func(e entry) bool { return e.at == at && source(e) })
		}
		for index, places := range table.ByLoop {
			device := fmt.Sprint("/dev/loop", index)
			if i, ok := loopdev.IndexOf(device); !ok || i != index {
				t.Errorf("loop device %d", index)
			}
			for _, at := range places {
				if !named(at, func(e entry) bool {
					return e.source == device || e.fsType == "devtmpfs" && "/dev"+e.root == device
				}) {
					t.Errorf("%s is no mount of %s", at, device)
				}
			}
		}
		for _, m := range table.Disks {
			if image.CheckID(m.ID) != nil || !named(m.At, func(e entry) bool { return e.fsType == "tmpfs" && e.source == DiskSource(m.ID) }) {
				t.Errorf("%+v is listed as a disk image, but no tmpfs at its path has its id as source", m)
			}
		}
		for _, m := range table.Of(image.Record{ID: "img", Mode: image.ModeFilesystem}, []int{3}) {
			if !slices.Contains(table.ByLoop[3], m) {
				t.Errorf("%s is no mount of the volume", m)
			}
		}
	})
}
