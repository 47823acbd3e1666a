// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loops

import (
	"slices"
	"testing"
)

// The devices of a pool in a file, and of others on the same machine.
var (
	poolImage = File{Dev: 0xfe00, Ino: 40}
	machine   = []Device{
		{Name: "loop0", Number: 0x700, Path: "/srv/other.img", Backing: File{0xfe00, 41}},              // another file beside the pool's
		{Name: "loop1", Number: 0x701, Path: "/state/pool.img", Backing: poolImage},                    // the pool
		{Name: "loop2", Number: 0x702, Path: "/mnt/volumes/#7 (deleted)", Backing: File{0x701, 7}},     // a volume
		{Name: "loop3", Number: 0x703, Path: "/dev/loop2", Backing: File{0x6, 90}, Block: 0x702},       // kubelet holds it
		{Name: "loop4", Number: 0x704, Path: "/mnt/volumes/#7 (deleted)", Backing: File{0x700, 7}},     // same path, on loop0
		{Name: "loop5", Number: 0x705, Path: "/dev/loop0", Backing: File{0x6, 91}, Block: 0x700},       // of somebody else's block volume
		{Name: "loop6", Number: 0x706, Path: "/state/pool.img", Backing: File{0xfd00, 40}},             // same path and inode, another filesystem
		{Name: "loop7", Number: 0x707, Path: "/mnt/volumes/inner/x.img", Backing: File{0x703, 8}},      // on a filesystem on loop3
		{Name: "loop8", Number: 0x708, Path: "/mnt/volumes-of-another/x.img", Backing: File{0x701, 9}}, // in another directory of the pool
	}
)

func names(devices []Device) (names []string) {
	for _, d := range devices {
		names = append(names, d.Name)
	}
	return names
}

func TestAbove(t *testing.T) {
	for _, c := range []struct {
		file File
		want []string
	}{
		{poolImage, []string{"loop7", "loop3", "loop2", "loop8", "loop1"}},
		{File{0xfe00, 41}, []string{"loop4", "loop5", "loop0"}},
		{File{0xfe00, 42}, nil},
	} {
		if got := names(Above(machine, c.file)); !slices.Equal(got, c.want) {
			t.Errorf("above %v are %q, not %q", c.file, got, c.want)
		}
	}
	ring := []Device{{Name: "loop1", Number: 0x701, Backing: poolImage, Block: 0x702}, {Name: "loop2", Number: 0x702, Block: 0x701}}
	if got := names(Above(ring, poolImage)); !slices.Equal(got, []string{"loop2", "loop1"}) {
		t.Errorf("of a ring: %q", got)
	}
}

func TestBelow(t *testing.T) {
	for _, c := range []struct {
		dir        string
		filesystem uint64
		want       []string
	}{
		{"/mnt/volumes", 0x701, []string{"loop2"}},
		{"/mnt", 0x701, []string{"loop2", "loop8"}},
		{"/state", 0xfe00, []string{"loop1"}},
		{"/mnt/volumes", 0x9, nil},
	} {
		if got := names(below(machine, c.dir, c.filesystem)); !slices.Equal(got, c.want) {
			t.Errorf("below %s are %q, not %q", c.dir, got, c.want)
		}
	}
}
