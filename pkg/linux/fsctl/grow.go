// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// ErrNotPermitted means that this process may not grow the filesystem while it
// is mounted.
var ErrNotPermitted = errors.New("growing a mounted filesystem is not permitted here")

const (
	btrfsIocResize     = 0x50009403 // _IOW(BTRFS_IOCTL_MAGIC, 3, struct btrfs_ioctl_vol_args)
	btrfsIocDevInfo    = 0xd000941e // _IOWR(BTRFS_IOCTL_MAGIC, 30, struct btrfs_ioctl_dev_info_args)
	xfsIocFSGeometryV1 = 0x80705864 // _IOR('X', 100, struct xfs_fsop_geom_v1)
	xfsIocFSGrowFSData = 0x4010586e // _IOW('X', 110, struct xfs_growfs_data)
	ext4IocResizeFS    = 0x40086610 // _IOW('f', 16, __u64)
)

// MayGrow tells in advance whether [Grow] would return [ErrNotPermitted] on a
// filesystem of a type, named as for mount(2).
//
// ext4_resize_begin in fs/ext4/resize.c starts with
// "if (!capable(CAP_SYS_RESOURCE)) return -EPERM;".
func MayGrow(fsType string) error {
	if fsType != "ext4" {
		return nil
	}
	may, err := process.Capable(process.SysResource)
	if err == nil && !may {
		err = fmt.Errorf("%w: ext4 needs CAP_SYS_RESOURCE for that", ErrNotPermitted)
	}
	return err
}

// Grow makes f's filesystem size bytes large. The device has that size already, or a larger
// one. A filesystem of that size, or a larger one, stays as it is.
//
// Errors: [ErrNotPermitted], [errors.ErrUnsupported] for a filesystem other than
// btrfs, ext4 and xfs, or the kernel's.
func Grow(f *os.File, size int64) error {
	st, err := StatusOf(f)
	if err != nil {
		return err
	}
	switch st.Type {
	case Btrfs:
		return growBtrfs(f, size)
	case Ext4:
		return growExt4(f, size/st.BlockSize)
	case XFS:
		return growXFS(f, size)
	}
	return fmt.Errorf("growing %s: %w: it is on %s (f_type %#x), only btrfs, ext4 and xfs can grow", f.Name(), errors.ErrUnsupported, st.Type.Name(), int64(st.Type))
}

// btrfsDevice is struct btrfs_ioctl_dev_info_args.
type btrfsDevice struct {
	id          uint64
	_           [16]byte
	used, total uint64
	_           [16]byte
	_           [377]uint64
	_           [1024]byte
}

// growBtrfs resizes device 1, the only one: btrfs-filesystem(8), resize. It does not ask for
// "max", which is the size of the block device.
func growBtrfs(f *os.File, size int64) error {
	dev := btrfsDevice{id: 1}
	if err := ioctlPtr("BTRFS_IOC_DEV_INFO", f, btrfsIocDevInfo, unsafe.Pointer(&dev)); err != nil {
		return fmt.Errorf("BTRFS_IOC_DEV_INFO %s: %w", f.Name(), err)
	}
	if dev.total >= uint64(size) { // a smaller size would shrink it
		return nil
	}
	args := struct {
		fd   int64
		name [4088]byte
	}{}
	copy(args.name[:], fmt.Sprintf("1:%d", size))
	if err := ioctlPtr("BTRFS_IOC_RESIZE", f, btrfsIocResize, unsafe.Pointer(&args)); err != nil {
		return fmt.Errorf("BTRFS_IOC_RESIZE %s: %w", f.Name(), err)
	}
	return nil
}

func growExt4(f *os.File, blocks int64) error {
	count := uint64(blocks)
	err := ioctlPtr("EXT4_IOC_RESIZE_FS", f, ext4IocResizeFS, unsafe.Pointer(&count))
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: EXT4_IOC_RESIZE_FS %s: %w", ErrNotPermitted, f.Name(), err)
	}
	if err != nil {
		return fmt.Errorf("EXT4_IOC_RESIZE_FS %s: %w", f.Name(), err)
	}
	return nil
}

// xfsGeometry is struct xfs_fsop_geom_v1.
type xfsGeometry struct {
	blockSize, rtExtSize, agBlocks, agCount   uint32
	logBlocks, sectSize, inodeSize, inodeMaxP uint32
	dataBlocks                                uint64
	_                                         [64]byte
}

// growXFS passes the present imaxpct on, since the call sets it too.
func growXFS(f *os.File, size int64) error {
	var g xfsGeometry
	if err := ioctlPtr("XFS_IOC_FSGEOMETRY_V1", f, xfsIocFSGeometryV1, unsafe.Pointer(&g)); err != nil {
		return fmt.Errorf("XFS_IOC_FSGEOMETRY_V1 %s: %w", f.Name(), err)
	}
	grow := struct {
		newBlocks uint64
		imaxPct   uint32
		_         uint32
	}{newBlocks: uint64(size) / uint64(g.blockSize), imaxPct: g.inodeMaxP}
	if grow.newBlocks <= g.dataBlocks {
		return nil
	}
	if err := ioctlPtr("XFS_IOC_FSGROWFSDATA", f, xfsIocFSGrowFSData, unsafe.Pointer(&grow)); err != nil {
		return fmt.Errorf("XFS_IOC_FSGROWFSDATA %s: %w", f.Name(), err)
	}
	return nil
}

func ioctlPtr(name string, f *os.File, request uintptr, arg unsafe.Pointer) error {
	return sys.Effect(name, f, func(fd int) error {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); e != 0 {
			return e
		}
		return nil
	})
}
