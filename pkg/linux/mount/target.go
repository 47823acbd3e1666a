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
	// Without links a path means what it says, so it may be judged as text, and
	// mkdirat gets a plain name.
	if !filepath.IsLocal(rel) {
		return nil, fmt.Errorf("%w: mkdir %s below %s", ErrEscapes, rel, root.Name())
	}
	rel = filepath.Clean(rel)
	parent, err := OpenTarget(root, filepath.Dir(rel), unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	name := filepath.Base(rel)
	err = sys.On(parent, func(fd int) error { return unix.Mkdirat(fd, name, uint32(perm.Perm())) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, &os.PathError{Op: "mkdirat", Path: filepath.Join(root.Name(), rel), Err: err}
	}
	return OpenTarget(parent, name, unix.O_DIRECTORY)
}

// RmdirTarget removes an empty directory below root, found as [OpenTarget] does.
func RmdirTarget(root *os.File, rel string) error {
	parent, err := OpenTarget(root, filepath.Dir(rel), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer parent.Close()
	err = sys.On(parent, func(fd int) error { return unix.Unlinkat(fd, filepath.Base(rel), unix.AT_REMOVEDIR) })
	if err != nil {
		return &os.PathError{Op: "rmdir", Path: filepath.Join(root.Name(), rel), Err: err}
	}
	return nil
}
