// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package quota bounds the space of single files by the project quotas of xfs. Each file is in
// one project, whose number is an attribute of its inode, and the filesystem refuses blocks
// that would take a project beyond its hard limit.
//
// Shared extents count in full, for each file that has them. So do blocks that are promised to
// dirty pages, and those to which shared ones are about to be copied. The error of a write
// beyond the limit is [syscall.ENOSPC], and not EDQUOT as for users and groups
// (xfs_trans_dqresv in fs/xfs/xfs_trans_dquot.c). Project 0 has no limit.
//
// Caveats: whoever owns a file, or has CAP_FOWNER, may move it to another project, unless they
// are in a user namespace (fileattr_set_prepare in fs/ioctl.c). Limits can be set only by
// CAP_SYS_ADMIN. quotactl_fd(2) needs Linux 5.14: on an older kernel no filesystem has quotas
// here.
//
// Sources: quotactl(2), FS_IOC_FSSETXATTR in ioctl_xfs_fsgetxattr(2), and
// include/uapi/linux/dqblk_xfs.h.
package quota

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

const (
	fsIocFSGetXAttr = 0x801c581f // _IOR('X', 31, struct fsxattr), linux/fs.h
	fsIocFSSetXAttr = 0x401c5820 // _IOW('X', 32, struct fsxattr)

	// QCMD(Q_X…, PRJQUOTA) of linux/quota.h and linux/dqblk_xfs.h.
	getQuota  = 0x5803<<8 | 2 // Q_XGETQUOTA
	setLimit  = 0x5804<<8 | 2 // Q_XSETQLIM
	getStatus = 0x5808<<8 | 2 // Q_XGETQSTATV

	blockHard = 1 << 3 // FS_DQ_BHARD
	enforced  = 1 << 5 // FS_QUOTA_PDQ_ENFD
	basic     = 512    // bytes of a basic block, in which these calls count
)

// attributes is struct fsxattr.
type attributes struct {
	flags, extentSize, extents, project, cowExtentSize uint32
	_                                                  [8]byte
}

// diskQuota is struct fs_disk_quota.
type diskQuota struct {
	version, flags       int8
	mask                 uint16
	id                   uint32
	blockHard, blockSoft uint64
	inodeHard, inodeSoft uint64
	blocks, inodes       uint64
	_                    [56]byte
}

// status is struct fs_quota_statv.
type status struct {
	version int8
	_       byte
	flags   uint16
	_       [156]byte
}

// Project returns the project of a file. It returns 0 if the filesystem has no projects.
func Project(f *os.File) (uint32, error) {
	var a attributes
	err := sys.On(f, func(fd int) error { return ioctl(fd, fsIocFSGetXAttr, &a) })
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("FS_IOC_FSGETXATTR %s: %w", f.Name(), err)
	}
	return a.project, nil
}

// SetProject moves a file to a project, with all of its blocks. A caller with CAP_FOWNER may do
// that beyond the project's limit.
func SetProject(f *os.File, id uint32) error {
	err := sys.Effect("FS_IOC_FSSETXATTR", f, func(fd int) error {
		var a attributes
		if err := ioctl(fd, fsIocFSGetXAttr, &a); err != nil {
			return err
		}
		a.project = id
		return ioctl(fd, fsIocFSSetXAttr, &a)
	})
	if err != nil {
		return fmt.Errorf("FS_IOC_FSSETXATTR project %d %s: %w", id, f.Name(), err)
	}
	return nil
}

func ioctl(fd int, request uintptr, a *attributes) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(a))); e != 0 {
		return e
	}
	return nil
}

// Enforced reports whether f's filesystem enforces the limits of projects: whether it is an xfs
// that was mounted with the option prjquota.
func Enforced(f *os.File) (bool, error) {
	s := status{version: 1} // FS_QSTATV_VERSION1
	err := sys.On(f, func(fd int) error { return quotactl(fd, getStatus, 0, unsafe.Pointer(&s)) })
	// ENOSYS: the kernel has no such call, or the filesystem no quotas. EOPNOTSUPP and EINVAL:
	// it has quotas of another kind.
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("Q_XGETQSTATV %s: %w", f.Name(), err)
	}
	return s.flags&enforced != 0, nil
}

// Usage is what a project takes, and what it may take.
type Usage struct {
	Bytes int64
	Files int64
	Limit int64 // bytes; 0 is none
}

// Get returns the usage of a project on f's filesystem, which must have quotas. A project that
// never was has the zero value.
func Get(f *os.File, id uint32) (Usage, error) {
	var q diskQuota
	err := sys.On(f, func(fd int) error { return quotactl(fd, getQuota, id, unsafe.Pointer(&q)) })
	if errors.Is(err, unix.ENOENT) {
		return Usage{}, nil
	}
	if err != nil {
		return Usage{}, fmt.Errorf("Q_XGETQUOTA project %d %s: %w", id, f.Name(), err)
	}
	return Usage{Bytes: int64(q.blocks) * basic, Files: int64(q.inodes), Limit: int64(q.blockHard) * basic}, nil
}

// SetLimit sets the hard limit of a project on the filesystem of f, which must have quotas, to so
// many bytes, rounded down to whole blocks. 0 is no limit.
func SetLimit(f *os.File, id uint32, bytes int64) error {
	q := diskQuota{version: 1, flags: 2 /* FS_PROJ_QUOTA */, mask: blockHard, id: id, blockHard: uint64(bytes) / basic}
	err := sys.Effect("quotactl_fd", f, func(fd int) error { return quotactl(fd, setLimit, id, unsafe.Pointer(&q)) })
	if err != nil {
		return fmt.Errorf("Q_XSETQLIM project %d %s: %w", id, f.Name(), err)
	}
	return nil
}

// quotactl is quotactl_fd(2): it takes any file of the filesystem instead of a device's path.
func quotactl(fd int, command uintptr, id uint32, addr unsafe.Pointer) error {
	if _, _, e := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), command, uintptr(id), uintptr(addr), 0, 0); e != 0 {
		return e
	}
	return nil
}
