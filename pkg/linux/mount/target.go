// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

var (
	// ErrEscapes means that a path leads out of its root.
	ErrEscapes = errors.New("the path leads out of its root")
	// ErrSymlink means that a component of a path is a symbolic link.
	ErrSymlink = errors.New("the path has a symbolic link")
)

// OpenTarget opens what rel names below root with O_PATH, and flags: 0, or
// syscall.O_DIRECTORY to insist on one. It follows no symbolic link, the last
// component included ([ErrSymlink]), and does not leave root ([ErrEscapes]);
// mount points may be crossed. root itself is "."; its own path was the caller's
// to trust.
func OpenTarget(root *os.File, rel string, flags int) (*os.File, error) {
	f, err := openat2(root, rel, flags)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%w: %w; mount nothing through links", ErrSymlink, err)
	case errors.Is(err, unix.EXDEV):
		return nil, fmt.Errorf("%w: %w", ErrEscapes, err)
	}
	return f, err
}

// openat2 resolves within the kernel, where no rename comes between.
//
// "RESOLVE_BENEATH: Do not permit the path resolution to succeed if any
// component of the resolution is not a descendant of the directory indicated by
// dirfd. [...] RESOLVE_NO_SYMLINKS: Disallow resolution of symbolic links during
// path resolution." openat2(2). Not with O_NOFOLLOW, which would make the last
// component's link itself a result.
func openat2(root *os.File, rel string, flags int) (*os.File, error) {
	path := filepath.Join(root.Name(), rel)
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_PATH | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		f, err := sys.OpenAt(path, root, func(fd int) (int, error) { return unix.Openat2(fd, rel, &how) })
		if errors.Is(err, unix.EAGAIN) {
			continue // a rename met a ".." in rel: "The caller may choose to retry"
		}
		if err != nil {
			return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
		}
		return f, nil
	}
}

// MkdirTarget makes sure that rel is a directory below root, and opens it like
// [OpenTarget]. It creates the last component only, with perm less the umask; a
// directory that exists stays as it is.
func MkdirTarget(root *os.File, rel string, perm os.FileMode) (*os.File, error) {
	return makeTarget(root, rel, unix.O_DIRECTORY, "mkdirat", func(parent int, name string) error {
		return unix.Mkdirat(parent, name, uint32(perm.Perm()))
	})
}

// MkfileTarget makes sure that rel is a file below root, for another file to be
// mounted on, like [MkdirTarget].
func MkfileTarget(root *os.File, rel string, perm os.FileMode) (*os.File, error) {
	return makeTarget(root, rel, 0, "mknodat", func(parent int, name string) error {
		return unix.Mknodat(parent, name, unix.S_IFREG|uint32(perm.Perm()), 0)
	})
}

func makeTarget(root *os.File, rel string, flags int, op string, create func(parent int, name string) error) (*os.File, error) {
	// Without links a path means what it says, so it may be judged as text, and
	// the call gets a plain name.
	if !filepath.IsLocal(rel) {
		return nil, fmt.Errorf("%w: %s %s below %s", ErrEscapes, op, rel, root.Name())
	}
	rel = filepath.Clean(rel)
	parent, err := OpenTarget(root, filepath.Dir(rel), unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	name := filepath.Base(rel)
	err = sys.Effect(op, parent, func(fd int) error { return create(fd, name) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: op, Path: filepath.Join(root.Name(), rel), Err: err}
	}
	return OpenTarget(parent, name, flags)
}

// RmdirTarget removes an empty directory below root, found as [OpenTarget] does.
func RmdirTarget(root *os.File, rel string) error {
	return removeTarget(root, rel, "rmdir", unix.AT_REMOVEDIR)
}

// RmfileTarget removes an empty regular file below root, found as [OpenTarget]
// does. Anything else is [os.ErrExist] and stays.
func RmfileTarget(root *os.File, rel string) error {
	f, err := OpenTarget(root, rel, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := sys.On(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > 0 {
		return fmt.Errorf("%s is not an empty file: %w; it is none of ours", f.Name(), os.ErrExist)
	}
	return removeTarget(root, rel, "unlink", 0)
}

// UnmountTarget unmounts what is on top at rel below root, found as [OpenTarget]
// does; never lazily, since a filesystem that is in use but nowhere to be found
// cannot be given back. On no mount point the error is [ErrNotMounted].
//
// The parent directory is open meanwhile, and that is on another mount than the
// one that goes, so that it does not keep it busy. Whose mount it is must have been
// looked up before, by the same name: the kernel unmounts by names only.
//
// "UMOUNT_NOFOLLOW (since Linux 2.6.34): Don't dereference target if it is a
// symbolic link." umount(2)
func UnmountTarget(root *os.File, rel string) error {
	path := filepath.Join(root.Name(), rel)
	if rel = filepath.Clean(rel); !filepath.IsLocal(rel) || rel == "." {
		return fmt.Errorf("%w: umount %s below %s", ErrEscapes, rel, root.Name())
	}
	parent, err := OpenTarget(root, filepath.Dir(rel), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	err = sys.Effect("umount", parent, func(fd int) error {
		return unix.Unmount(fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(rel)), unix.UMOUNT_NOFOLLOW)
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: umount %s: %w", ErrNotMounted, path, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("umount %s: %w; look for processes that use it (fuser -vm %[1]s) and for mounts below it (findmnt -R %[1]s)", path, err)
	}
	return fmt.Errorf("umount %s: %w", path, err)
}

func removeTarget(root *os.File, rel, op string, flags int) error {
	parent, err := OpenTarget(root, filepath.Dir(rel), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	err = sys.Effect(op, parent, func(fd int) error { return unix.Unlinkat(fd, filepath.Base(rel), flags) })
	if err != nil {
		return &os.PathError{Op: op, Path: filepath.Join(root.Name(), rel), Err: err}
	}
	return nil
}
