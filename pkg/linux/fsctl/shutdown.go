// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

const (
	// fsShutdown is _IOR('X', 125, __u32). It has a name for each filesystem:
	// EXT4_IOC_SHUTDOWN in fs/ext4/ext4.h, XFS_IOC_GOINGDOWN in fs/xfs/libxfs/xfs_fs.h, and
	// BTRFS_IOC_SHUTDOWN, which kernels up to 6.18 do not have.
	fsShutdown = 0x8004587d
	noLogFlush = 2 // EXT4_GOING_FLAGS_NOLOGFLUSH, XFS_FSOP_GOING_FLAGS_NOLOGFLUSH
)

// Shutdown ends all I/O of a filesystem at once. What is dirty is never written, not even by
// an unmount, and whoever still uses the filesystem gets EIO. It is for a filesystem whose
// content nobody wants any more. root is a file or directory on it.
//
// A filesystem, or a kernel, that cannot do that returns [errors.ErrUnsupported].
func Shutdown(root *os.File) error {
	err := sys.Effect("FS_IOC_SHUTDOWN", root, func(fd int) error { return unix.IoctlSetPointerInt(fd, fsShutdown, noLogFlush) })
	if errors.Is(err, unix.ENOTTY) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	if err != nil {
		return fmt.Errorf("shut down the filesystem at %s: %w", root.Name(), err)
	}
	return nil
}
