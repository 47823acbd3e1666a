// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrNotMounted means that the path is not a mount point.
var ErrNotMounted = errors.New("not a mount point")

// IsMountPoint reports whether f is the root of a mount, be it a [Detached] one. The
// answer is about f, not about its path, on which something may have been mounted since.
// A filesystem that has shut down may answer with EIO. [Of] does not ask the filesystem.
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

// At is [Of] the topmost file at path. The caller vouches for the path. At returns nil
// too if path does not exist, or if it is a symbolic link.
func At(path string) (*Info, error) {
	f, err := sys.Open(path, func() (int, error) {
		return unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "open O_PATH", Path: path, Err: err}
	}
	defer f.Close()
	return Of(f)
}

// Info is a mount, as the mount table shows it.
type Info struct {
	FSType string
	// Source is the path of a device, or whatever the mount was given.
	Source string
	// Root is the path in the filesystem that is mounted: "/", unless it is a bind mount.
	Root       string
	Mountpoint string
	Attr       Attr
	// Options are the filesystem's, with commas between them: "ro" if its superblock is
	// read-only, else "rw", and behind that what it shows of its own. proc_pid_mountinfo(5),
	// field 11, has a few more that every filesystem has, such as "sync". [SplitOptions] takes
	// them apart.
	Options      string
	Major, Minor int // the filesystem's device number
	// Shared means that what is mounted on it is seen in other mount namespaces too. A container has such a mount with
	// mountPropagation: Bidirectional. "shared:X: Mount is shared in peer group X." proc_pid_mountinfo(5)
	Shared bool
}

// SplitOptions returns the single options of an [Info]. The value of one may have commas if it is
// in double quotes, as an SELinux context is. It is returned without them.
//
// show_sid in security/selinux/hooks.c
func SplitOptions(options string) (words []string) {
	quoted := false
	var word strings.Builder
	for _, c := range []byte(options) {
		switch {
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			words = append(words, word.String())
			word.Reset()
		default:
			word.WriteByte(c)
		}
	}
	return append(words, word.String())
}

// Of returns the mount whose root is f, or nil if f is not the root of a mount. f may be
// open with O_PATH, as from [OpenTarget]. A mount that is hidden below others is found too,
// and one that is detached, or of another mount namespace, is not.
func Of(f *os.File) (*Info, error) {
	if !statmountWorks() {
		return listed(f, true)
	}
	id, isRoot, err := uniqueID(f)
	switch {
	case err != nil: // a filesystem that has shut down need not answer, but the mount table does
		return listed(f, true)
	case !isRoot:
		return nil, nil
	}
	return statmount(id)
}

// Holding returns the mount that f is on.
func Holding(f *os.File) (*Info, error) {
	look := func() (*Info, error) { return listed(f, false) }
	if statmountWorks() {
		if id, _, err := uniqueID(f); err == nil {
			look = func() (*Info, error) { return statmount(id) }
		}
	}
	info, err := look()
	if err == nil && info == nil {
		err = fmt.Errorf("%w: %s is on a mount that the mount table does not show", ErrNotMounted, f.Name())
	}
	return info, err
}

// listed looks for the mount that f is on in the whole mount table, or returns nil. That
// takes longer with each mount of the machine. If f has to be the mount's root, listed
// returns nil for any other file.
//
// It looks for the mount's ID, since mountinfo also lists mounts that are hidden below
// others. The ID comes from fdinfo, which works on a filesystem that has shut down.
func listed(f *os.File, root bool) (*Info, error) {
	id, path, err := whereIs(f)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.ID != id || root && m.Mountpoint != path, m.ID == id
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	if len(mounts) == 0 {
		return nil, nil // f is below the root of its mount, or was unmounted meanwhile
	}
	m := mounts[0]
	return &Info{
		FSType: m.FSType, Source: m.Source, Root: m.Root, Mountpoint: m.Mountpoint,
		Attr: attrOfWords(m.Options), Options: m.VFSOptions, Major: m.Major, Minor: m.Minor,
		Shared: strings.Contains(m.Optional, "shared:"),
	}, nil
}

// List returns the mounts of this process for which match returns true, and reads the whole
// mount table for that. It looks only at mounts whose line contains one of the texts, as
// proc_pid_mountinfo(5) spells it: to understand a line takes longer than to find a text in it.
func List(match func(*mountinfo.Info) bool, texts ...string) ([]*mountinfo.Info, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return search(table, match, texts)
}

// search is [List] for a mount table that was read.
func search(table []byte, match func(*mountinfo.Info) bool, texts []string) ([]*mountinfo.Info, error) {
	var lines bytes.Buffer
	for line := range bytes.Lines(table) {
		if slices.ContainsFunc(texts, func(text string) bool { return bytes.Contains(line, []byte(text)) }) {
			lines.Write(line)
		}
	}
	mounts, err := mountinfo.GetMountsFromReader(&lines, func(m *mountinfo.Info) (skip, stop bool) { return !match(m), false })
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	return mounts, nil
}

// whereIs returns the ID of the mount that f is on, and f's path without links.
//
// "mnt_id: This field, present since Linux 3.15, is the ID of the mount
// containing this file." proc_pid_fdinfo(5)
func whereIs(f *os.File) (id int, path string, err error) {
	var info []byte
	var n int
	err = sys.On(f, func(fd int) (err error) {
		n = fd
		if path, err = os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil {
			info, err = os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
		}
		return err
	})
	if err != nil {
		return 0, "", err
	}
	for line := range strings.Lines(string(info)) {
		if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			if id, err = strconv.Atoi(strings.TrimSpace(value)); err != nil {
				return 0, "", fmt.Errorf("/proc/self/fdinfo/%d of %s has the mnt_id %q, which is not a number", n, f.Name(), strings.TrimSpace(value))
			}
			return id, path, nil
		}
	}
	return 0, "", fmt.Errorf("/proc/self/fdinfo/%d of %s has no mnt_id", n, f.Name())
}
