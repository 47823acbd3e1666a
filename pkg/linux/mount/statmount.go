// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// statmountWorks reports whether the kernel tells everything in [Info] by statmount(2), as
// it does since Linux 6.13. It asks about /proc, whose source is not empty: of an empty
// string the kernel says the same as of a field that it does not know.
var statmountWorks = sync.OnceValue(func() bool {
	proc, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer proc.Close()
	id, _, err := uniqueID(proc)
	if err != nil {
		return false
	}
	info, err := statmount(id)
	return err == nil && info != nil && info.Source != ""
})

// Single reports whether the kernel tells of one mount without listing all: see [Of].
func Single() bool { return statmountWorks() }

// uniqueID returns the ID of the mount that f is on, which no other mount gets before the
// next boot, and whether f is its root.
//
// "STATX_MNT_ID_UNIQUE: Want stx_mnt_id to be the 64-bit unique mount ID (since Linux 6.8)".
// statx(2)
func uniqueID(f *os.File) (id uint64, root bool, err error) {
	var st unix.Statx_t
	err = sys.On(f, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID_UNIQUE, &st)
	})
	if err != nil {
		return 0, false, fmt.Errorf("statx %s: %w", f.Name(), err)
	}
	if st.Mask&unix.STATX_MNT_ID_UNIQUE == 0 {
		return 0, false, fmt.Errorf("statx %s: no STATX_MNT_ID_UNIQUE; this needs Linux 6.8", f.Name())
	}
	return st.Mnt_id, st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// request is struct mnt_id_req in include/uapi/linux/mount.h, in its first version.
type request struct {
	size, _   uint32
	id, param uint64
}

// reply is struct statmount in include/uapi/linux/mount.h, without the strings behind it. A
// string's field holds the offset at which it begins there.
type reply struct {
	size, options uint32
	mask          uint64
	major, minor  uint32
	_             uint64 // sb_magic
	flags, fsType uint32
	_             [3]uint64 // IDs of the mount and its parent
	attr          uint64
	propagation   uint64
	_             [3]uint64 // IDs of peer groups
	root, point   uint32
	_             uint64 // mnt_ns_id
	subtype       uint32
	source        uint32
	_             [48]uint64
}

// What is asked of statmount: STATMOUNT_* in include/uapi/linux/mount.h.
const (
	wantSuperblock = 0x1
	wantMount      = 0x2
	wantRoot       = 0x8
	wantPoint      = 0x10
	wantFSType     = 0x20
	wantOptions    = 0x80  // since Linux 6.11
	wantSubtype    = 0x100 // since Linux 6.13
	wantSource     = 0x200 // since Linux 6.13

	superblockReadOnly = 0x1 // SB_RDONLY in sb_flags
)

// statmount describes the mount with a unique ID, or returns nil if the calling thread's mount
// namespace has none.
//
// "statmount — get a mount status [...] EOVERFLOW: The size of mnt is too small." statmount(2)
func statmount(id uint64) (*Info, error) {
	req := request{
		size: uint32(unsafe.Sizeof(request{})), id: id,
		param: wantSuperblock | wantMount | wantRoot | wantPoint | wantFSType | wantOptions | wantSubtype | wantSource,
	}
	const most = 1 << 20 // an overlay has its many directories among its options
	for size := 4 << 10; ; size *= 4 {
		buf := make([]uint64, size/8) // aligned as a reply is
		err := sys.Retry(func() error {
			_, _, e := unix.Syscall6(unix.SYS_STATMOUNT, uintptr(unsafe.Pointer(&req)), uintptr(unsafe.Pointer(&buf[0])), uintptr(size), 0, 0, 0)
			if e != 0 {
				return e
			}
			return nil
		})
		switch {
		case err == nil:
			return (*reply)(unsafe.Pointer(&buf[0])).info(), nil
		case errors.Is(err, unix.ENOENT):
			return nil, nil
		case !errors.Is(err, unix.EOVERFLOW) || size >= most:
			return nil, fmt.Errorf("statmount: %w", err)
		}
	}
}

func (r *reply) info() *Info {
	all := unsafe.Slice((*byte)(unsafe.Pointer(r)), r.size)
	text := func(want uint64, at uint32) string {
		if r.mask&want == 0 { // it is empty
			return ""
		}
		return unix.ByteSliceToString(all[unsafe.Sizeof(*r)+uintptr(at):])
	}
	i := &Info{
		FSType: text(wantFSType, r.fsType), Source: text(wantSource, r.source),
		Root: text(wantRoot, r.root), Mountpoint: text(wantPoint, r.point),
		Attr: attrOfBits(r.attr), Options: "rw", Major: int(r.major), Minor: int(r.minor),
		Shared: r.propagation&unix.MS_SHARED != 0,
	}
	if r.flags&superblockReadOnly != 0 {
		i.Options = "ro"
	}
	if own := text(wantOptions, r.options); own != "" {
		i.Options += "," + own
	}
	if subtype := text(wantSubtype, r.subtype); subtype != "" {
		i.FSType += "." + subtype
	}
	return i
}
