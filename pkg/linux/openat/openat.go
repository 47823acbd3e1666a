// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package openat opens, looks at and removes files relative to an open directory. The
// directory stays the same one, whatever its path leads to by now: something may
// have been mounted over it, or it may have been renamed.
//
// Caveat: a name may have several components, and symbolic links in all but its
// last one are followed. For paths that others can change, use
// pkg/linux/mount.OpenTarget.
//
// Sources: openat(2), fstatat(2), renameat2(2), unlinkat(2).
package openat

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

const (
	// patience is longer than a loaded machine keeps a thread from ending its lease. Without a
	// bound, whoever owns a file could keep its openers for 45 s (/proc/sys/fs/lease-break-time).
	patience = time.Second
	poll     = 100 * time.Microsecond
)

// Open opens a file that exists. flags are those of open(2), without O_CREAT.
//
// With O_NONBLOCK it waits a moment for another's lease to end. Package lease takes leases
// of some microseconds.
//
// "If pathname is relative, then it is interpreted relative to the directory
// referred to by the file descriptor dirfd [...] EWOULDBLOCK: The O_NONBLOCK flag was
// specified, and an incompatible lease was held on the file (see fcntl(2))." openat(2)
func Open(dir *os.File, name string, flags int) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	var f *os.File
	var err error
	for deadline := time.Now().Add(patience); ; time.Sleep(poll) {
		f, err = sys.OpenAt(path, dir, func(fd int) (int, error) {
			return unix.Openat(fd, name, flags|unix.O_CLOEXEC, 0)
		})
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: path, Err: err}
	}
	return f, nil
}

// Create makes an empty file that does not exist yet, with mode 0600, and opens it for
// reading.
func Create(dir *os.File, name string) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	f, err := sys.OpenAtEffect("openat", path, dir, func(fd int) (int, error) {
		return unix.Openat(fd, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: path, Err: err}
	}
	return f, nil
}

// Status is a part of what stat(2) tells of a file.
type Status struct {
	Device, Inode uint64
	Changed       time.Time // the status change time: every change of content or attribute moves it
	Modified      time.Time // the modification time, which utimensat(2) sets
	Regular       bool      // a regular file
	Size          int64     // bytes
	Allocated     int64     // bytes; shared extents count in every file
}

// Stat returns the status of a file, without opening it. A symbolic link is not followed.
//
// "fstatat(): AT_SYMLINK_NOFOLLOW: If pathname is a symbolic link, do not dereference it:
// instead return information about the link itself" fstatat(2)
func Stat(dir *os.File, name string) (Status, error) {
	var st unix.Stat_t
	err := sys.On(dir, func(fd int) error { return unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	if err != nil {
		return Status{}, &os.PathError{Op: "fstatat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return Status{
		Device: st.Dev, Inode: st.Ino, Changed: time.Unix(st.Ctim.Unix()), Modified: time.Unix(st.Mtim.Unix()),
		Regular: st.Mode&unix.S_IFMT == unix.S_IFREG, Size: st.Size, Allocated: st.Blocks * 512,
	}, nil
}

// Rename gives a file another name, in one step. If the new name exists, the error is [os.ErrExist].
//
// "RENAME_NOREPLACE: Don't overwrite newpath of the rename. Return an error if newpath already
// exists." renameat2(2)
func Rename(dir *os.File, name, to string) error {
	err := sys.Effect("rename", dir, func(fd int) error { return unix.Renameat2(fd, name, fd, to, unix.RENAME_NOREPLACE) })
	if err != nil {
		return &os.LinkError{Op: "renameat2", Old: filepath.Join(dir.Name(), name), New: filepath.Join(dir.Name(), to), Err: err}
	}
	return nil
}

// Remove makes sure that a file has no name there. A directory is not removed.
//
// "The unlinkat() system call operates in exactly the same way as either unlink()
// or rmdir() (depending on whether or not flags includes the AT_REMOVEDIR flag)"
// unlinkat(2)
func Remove(dir *os.File, name string) error {
	err := sys.Effect("unlink", dir, func(fd int) error { return unix.Unlinkat(fd, name, 0) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlinkat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return nil
}
