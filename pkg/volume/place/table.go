// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Table is the part of the mount table that a sweep looks at.
type Table struct {
	ByLoop map[int][]string // mountpoints of a loop device, or of its node, by index
	Disks  []DiskMount      // the tmpfs of [image.ModeDiskImage] volumes
}

// DiskMount is the tmpfs of a [image.ModeDiskImage] volume.
type DiskMount struct {
	At string // mountpoint
	ID string // the volume's
}

// ReadTable reads the whole mount table of this process.
func ReadTable() (Table, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return Table{}, fmt.Errorf("read mountinfo: %w", err)
	}
	var entries []entry
	for _, i := range mounts {
		entries = append(entries, entry{at: i.Mountpoint, root: i.Root, fsType: i.FSType, source: i.Source})
	}
	return tabulate(entries), nil
}

// entry is a line of proc_pid_mountinfo(5).
type entry struct {
	at, root, fsType, source string
}

func tabulate(entries []entry) Table {
	t := Table{ByLoop: map[int][]string{}}
	for _, e := range entries {
		device := e.source
		if e.fsType == "devtmpfs" { // a bind of a device node: its root is the node's path in devtmpfs
			device = "/dev" + e.root
		}
		if index, ok := loopdev.IndexOf(device); ok {
			t.ByLoop[index] = append(t.ByLoop[index], e.at)
		}
		if id, ok := strings.CutPrefix(e.source, DiskSource("")); ok && e.fsType == "tmpfs" && image.CheckID(id) == nil {
			t.Disks = append(t.Disks, DiskMount{At: e.at, ID: id})
		}
	}
	return t
}

// Of lists the mountpoints of a volume that has these loop devices.
func (t Table) Of(r image.Record, loops []int) []string {
	var places []string
	for _, index := range loops {
		places = append(places, t.ByLoop[index]...)
	}
	for _, d := range t.Disks {
		if r.Mode == image.ModeDiskImage && d.ID == r.ID {
			places = append(places, d.At)
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(places)))
}
