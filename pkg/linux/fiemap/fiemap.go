// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package fiemap tells where the space of a file is.
//
// Preallocated space that was never written has extents too, unlike in [SEEK_DATA]. Space
// that was promised to dirty pages has none yet: both functions write such pages out first.
//
// Caveat: a physical address is a place on the filesystem's block device for ext4 and xfs.
// For btrfs it is an address in a space of its own, which the chunk tree maps to devices.
//
// Source: Documentation/filesystems/fiemap.rst.
//
// [SEEK_DATA]: https://man7.org/linux/man-pages/man2/lseek.2.html
package fiemap

import (
	"fmt"
	"iter"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// header is struct fiemap of linux/fiemap.h without its trailing array.
type header struct {
	start, length uint64
	flags         uint32
	mapped        uint32
	count         uint32
	_             uint32
}

// extent is struct fiemap_extent.
type extent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

// atOnce is how many extents one call returns. Images of volumes have some tens of them.
const atOnce = 64

type request struct {
	header
	extents [atOnce]extent
}

const (
	fsIocFiemap = 0xc020660b // _IOWR('f', 11, struct fiemap), linux/fs.h
	flagSync    = 1          // FIEMAP_FLAG_SYNC: "the kernel will sync the file before mapping extents"

	extentLast    = 0x1 // FIEMAP_EXTENT_LAST
	extentUnknown = 0x2 // FIEMAP_EXTENT_UNKNOWN: "Data location unknown."
	extentEncoded = 0x8 // FIEMAP_EXTENT_ENCODED: compressed, or in another way not a place
	extentInline  = 0x200
	extentShared  = 0x2000 // FIEMAP_EXTENT_SHARED: "Space shared with other files."
)

func ioctl(f *os.File, r *header) error {
	err := sys.On(f, func(fd int) error {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(r))); e != 0 {
			return e
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("FIEMAP %s: %w", f.Name(), err)
	}
	return nil
}

// Count returns the number of f's extents, on which the cost of a clone depends. Space that
// xfs preallocated behind a growing file counts too.
//
// "If fm_extent_count is zero, then the fm_extents[] array is ignored (no
// extents will be returned), and the fm_mapped_extents count will hold the
// number of extents needed [...] to hold the file's current mapping." fiemap.rst
func Count(f *os.File) (int, error) {
	r := header{length: ^uint64(0), flags: flagSync}
	err := ioctl(f, &r)
	return int(r.mapped), err
}

// Extent is a part of a file that has space of its own or shares it, in bytes.
type Extent struct {
	Logical  int64 // its place in the file
	Physical int64 // its place in the filesystem, see the package's caveat; -1 if it has none
	Length   int64
	Shared   bool // with other files
}

// Extents yields the extents of f that lie in its bytes from start to end, in order. The
// first and the last may reach beyond. An error is the last thing it yields.
func Extents(f *os.File, start, end int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		var r request
		for at := start; at < end; {
			r.header = header{start: uint64(at), length: uint64(end - at), flags: flagSync, count: atOnce}
			if err := ioctl(f, &r.header); err != nil {
				yield(Extent{}, err)
				return
			}
			if r.mapped == 0 {
				return
			}
			for _, e := range r.extents[:r.mapped] {
				found := Extent{Logical: int64(e.logical), Physical: int64(e.physical), Length: int64(e.length), Shared: e.flags&extentShared != 0}
				if e.flags&(extentUnknown|extentEncoded|extentInline) != 0 {
					found.Physical = -1
				}
				if !yield(found, nil) || e.flags&extentLast != 0 {
					return
				}
				at = found.Logical + found.Length
			}
		}
	}
}

// Unshared returns how many bytes of f's extents no other file has: what is freed if f goes.
// Others may clone f, or write to a clone, meanwhile.
func Unshared(f *os.File) (bytes int64, err error) {
	for e, err := range Extents(f, 0, math.MaxInt64) {
		if err != nil {
			return 0, err
		}
		if !e.Shared {
			bytes += e.Length
		}
	}
	return bytes, nil
}
