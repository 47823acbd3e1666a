// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package reflink

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrUnsupported means that the filesystem cannot share extents.
var ErrUnsupported = errors.New("the filesystem cannot share extents: use btrfs, or an xfs made with `mkfs.xfs -m reflink=1`")

// Clone makes dst share all of src's extents. dst must be open for reading and
// writing, empty, and on src's filesystem. This is not checked: if dst is longer than
// src, its end stays. After an error discard dst.
//
// On a full filesystem the error is [syscall.ENOSPC].
//
// "FICLONE: This ioctl operation reflinks the whole file [...] If a file write
// should occur to a shared region, the filesystem must ensure that the changes
// remain private to the file being written." ioctl_ficlone(2)
func Clone(dst, src *os.File) error {
	err := sys.On(src, func(srcFd int) error {
		return sys.Effect("FICLONE", dst, func(dstFd int) error { return unix.IoctlFileClone(dstFd, srcFd) })
	})
	if err != nil {
		return explain(fmt.Sprintf("FICLONE %s to %s", src.Name(), dst.Name()), err)
	}
	return nil
}

// Try clones one block between two unnamed files in dir, and leaves nothing behind. It
// returns [ErrUnsupported] if the filesystem cannot clone at all, and [syscall.ENOSPC] if
// it is full.
func Try(dir *os.File) error {
	src, err := unnamed(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := unnamed(dir)
	if err != nil {
		return err
	}
	defer dst.Close()
	// A whole block that is not zero. btrfs stores less than a block inline in its metadata,
	// and holes have nothing to share.
	block := make([]byte, 4096)
	block[0] = 1
	if _, err := src.Write(block); err != nil {
		return err
	}
	err = Clone(dst, src)
	if errors.Is(err, unix.EINVAL) && !errors.Is(err, ErrUnsupported) {
		// Between two new files of one directory there is no other reason.
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return err
}

// unnamed opens a new file without a name: O_TMPFILE in open(2). It is not announced as
// an effect, since nobody else can see the file and Try closes it.
func unnamed(dir *os.File) (*os.File, error) {
	f, err := sys.OpenAt("unnamed file in "+dir.Name(), dir, func(fd int) (int, error) {
		return unix.Openat(fd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return nil, explain("open O_TMPFILE in "+dir.Name(), err)
	}
	return f, nil
}

// explain adds the errno's name, since several errnos have the same text, and what to do
// about it.
func explain(op string, err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("%s: %w", op, err)
	}
	name := unix.ErrnoName(errno)
	if errno == unix.EOPNOTSUPP {
		name = "EOPNOTSUPP" // the name in ioctl_ficlone(2); ENOTSUP is the same number
	}
	err = fmt.Errorf("%s: %s: %w", op, name, err)
	switch errno {
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.ENOSYS:
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case unix.EXDEV:
		return fmt.Errorf("%w; both must be on one filesystem", err)
	case unix.EINVAL:
		return fmt.Errorf("%w; on btrfs both must agree on chattr +C (see lsattr)", err)
	}
	return err
}
