// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrNotMounted means that the path is no mount point.
var ErrNotMounted = errors.New("not a mount point")

// IsMountPoint reports whether f is the root of a mount, a [Detached] one too.
// It speaks of f, not of its path: f may be below what was mounted there since.
// A filesystem that has shut down may answer with EIO; [At] does not ask it.
//
// "STATX_ATTR_MOUNT_ROOT (since Linux 5.8): The file is the root of a mount." statx(2)
func IsMountPoint(f *os.File) (bool, error) {
	var st unix.Statx_t
	err := sys.On(f, func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	})
	if err != nil {
		return false, fmt.Errorf("statx %s: %w", f.Name(), err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, fmt.Errorf("statx %s: no STATX_ATTR_MOUNT_ROOT; this needs Linux 5.8", f.Name())
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// At returns the mount that is visible at path, the topmost, or nil if path is
// no mount point or does not exist. A symbolic link is no mount point.
//
// The mount's ID decides, since mountinfo also lists what is hidden below other
// mounts. It comes from fdinfo, which works on a filesystem that has shut down.
func At(path string) (*mountinfo.Info, error) {
	id, resolved, err := whereIs(path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.ID != id || m.Mountpoint != resolved, m.ID == id
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(mounts) == 0 {
		return nil, nil // below the root of its mount, or unmounted meanwhile
	}
	return mounts[0], nil
}

// whereIs returns the ID of the mount that path is on, and path without links.
//
// "mnt_id: This field, present since Linux 3.15, is the ID of the mount
// containing this file." proc_pid_fdinfo(5)
func whereIs(path string) (id int, resolved string, err error) {
	f, err := sys.Open(path, func() (int, error) {
		return unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return 0, "", &os.PathError{Op: "open O_PATH", Path: path, Err: err}
	}
	defer f.Close()
	fd := strconv.Itoa(int(f.Fd()))
	if resolved, err = os.Readlink("/proc/self/fd/" + fd); err != nil {
		return 0, "", err
	}
	info, err := os.ReadFile("/proc/self/fdinfo/" + fd)
	if err != nil {
		return 0, "", err
	}
	for line := range strings.Lines(string(info)) {
		if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id, err = strconv.Atoi(strings.TrimSpace(value))
			return id, resolved, err
		}
	}
	return 0, "", fmt.Errorf("/proc/self/fdinfo/%s of %s has no mnt_id", fd, path)
}

// Unmount unmounts what is on top at target; never lazily, since a filesystem
// that is in use but nowhere to be found cannot be given back. On no mount point
// the error is [ErrNotMounted].
//
// "UMOUNT_NOFOLLOW (since Linux 2.6.34): Don't dereference target if it is a
// symbolic link." umount(2)
func Unmount(target string) error {
	err := sys.Retry(func() error {
		if err := failpoint.Before("umount"); err != nil {
			return err
		}
		return unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: umount %s: %w", ErrNotMounted, target, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("umount %s: %w; look for processes that use it (fuser -vm %[1]s) and for mounts below it (findmnt -R %[1]s)", target, err)
	}
	return fmt.Errorf("umount %s: %w", target, err)
}
