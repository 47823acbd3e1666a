// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// clean returns an entry's name relative to the root directory, "" for the root itself. A leading
// "/" means nothing, as in tar(1).
func clean(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New(`its path has a "..", which could leave the root directory`)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// split returns the directory and the last component of a clean name.
func split(name string) (dir, base string) {
	dir, base = path.Split(name)
	return strings.TrimSuffix(dir, "/"), base
}

// held is a directory that stays open: the next entry is likely to be in it too.
type held struct {
	name string // clean; "" if nothing is open
	fd   int
}

func (h *held) release() {
	if h.name != "" {
		unix.Close(h.fd)
		h.name = ""
	}
}

// hold keeps another directory open.
func (h *held) hold(name string, fd int) {
	h.release()
	h.name, h.fd = name, fd
}

// gone is called when a name has been removed, with everything beneath it.
func (h *held) gone(name string) {
	if h.name == name || strings.HasPrefix(h.name, name+"/") {
		h.release()
	}
}

// existing opens a directory for path lookups, without making it.
func (u *unpacker) existing(h *held, dir string) (int, error) {
	switch dir {
	case "":
		return u.root, nil
	case h.name:
		return h.fd, nil
	}
	fd, err := step(u.root, dir)
	if err == nil {
		h.hold(dir, fd)
	}
	return fd, err
}

// parent opens the directory that an entry is in, and makes it if it is missing.
func (u *unpacker) parent(dir string) (int, error) {
	fd, err := u.existing(&u.parents, dir)
	if err == nil || !notThere(err) {
		return fd, err
	}
	if fd, err = u.descend(dir); err == nil {
		u.parents.hold(dir, fd)
	}
	return fd, err
}

// step opens a directory beneath another one. No component of its name may be a symbolic link.
//
// "RESOLVE_BENEATH: Do not permit the path resolution to succeed if any component of the
// resolution is not a descendant of the directory indicated by dirfd." openat2(2)
func step(at int, dir string) (int, error) {
	return unix.Openat2(at, dir, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// notThere reports whether step failed because a directory is missing, or is another kind of file.
func notThere(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// descend opens a directory component by component, and makes those that are missing.
func (u *unpacker) descend(dir string) (int, error) {
	fd, own := u.root, false
	name := ""
	for base := range strings.SplitSeq(dir, "/") {
		name = path.Join(name, base)
		err := u.implied(fd, name, base)
		next := -1
		if err == nil {
			next, err = step(fd, base)
		}
		if own {
			unix.Close(fd)
		}
		if err != nil {
			return -1, err
		}
		fd, own = next, true
	}
	return fd, nil
}

// implied makes sure that a name is a directory. A lower layer's file gives way to it, as in an
// overlay. Within one archive that is refused: what was meant, nobody knows.
func (u *unpacker) implied(at int, name, base string) error {
	err := unix.Mkdirat(at, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		kind, err := kindOf(at, base)
		switch {
		case err != nil || kind == unix.S_IFDIR:
			return err
		case !u.above:
			return fmt.Errorf("%.200q is no directory, and nothing is unpacked through it", name)
		}
		if err := u.remove(at, name, base); err != nil {
			return err
		}
		return u.implied(at, name, base)
	}
	if err != nil {
		return os.NewSyscallError("mkdirat", err)
	}
	o := u.content.prepared(implied, unix.S_IFDIR)
	if err := unix.Fchownat(at, base, o.uid, o.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fchownat", err)
	}
	return os.NewSyscallError("fchmodat", unix.Fchmodat(at, base, o.mode, 0))
}

// kindOf returns the type of a file (S_IFMT).
func kindOf(at int, base string) (uint32, error) {
	var st unix.Stat_t
	err := unix.Fstatat(at, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st.Mode & unix.S_IFMT, os.NewSyscallError("fstatat", err)
}

// lostFound belongs to an ext4: e2fsck wants it.
const lostFound = "lost+found"

// remove removes a file, or a directory with all that is in it. name is its path from the root,
// base its name in the open directory.
func (u *unpacker) remove(at int, name, base string) error {
	if name == lostFound && u.lostFound {
		return errors.New("it would replace ext4's own lost+found")
	}
	u.parents.gone(name)
	u.targets.gone(name)
	err := unix.Unlinkat(at, base, 0)
	if errors.Is(err, unix.EISDIR) {
		return os.RemoveAll(beneath(at, base))
	}
	return os.NewSyscallError("unlinkat", err)
}

// beneath is a path to a name in an open directory, for calls that take no descriptor: proc(5).
func beneath(at int, base string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", at, base) }
