// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Attr are attributes of a mount, as opposed to its filesystem: MOUNT_ATTR_* in
// mount_setattr(2). The zero value is what mount(8) calls rw,suid,dev,exec,relatime.
type Attr struct {
	ReadOnly, NoSUID, NoDev, NoExec, NoATime bool
}

func (a Attr) bits() (bits uint64) {
	for _, b := range []struct {
		on  bool
		bit uint64
	}{
		{a.ReadOnly, unix.MOUNT_ATTR_RDONLY},
		{a.NoSUID, unix.MOUNT_ATTR_NOSUID},
		{a.NoDev, unix.MOUNT_ATTR_NODEV},
		{a.NoExec, unix.MOUNT_ATTR_NOEXEC},
		{a.NoATime, unix.MOUNT_ATTR_NOATIME},
	} {
		if b.on {
			bits |= b.bit
		}
	}
	return bits
}

// Config is a filesystem to mount.
type Config struct {
	FSType string
	// Source is a block device's path; empty for filesystems without.
	Source string
	// Data are the filesystem's own options, "key" or "key=value". "ro" makes
	// the superblock read-only; Attr.ReadOnly does so to this mount alone.
	Data []string
	Attr Attr
}

// Detached is a mount without a place. Close ends it, unless it got one.
type Detached struct{ root *os.File }

// New mounts a filesystem. An error has the kernel's own words where the
// filesystem says any.
func New(c Config) (*Detached, error) {
	what := c.FSType
	if c.Source != "" {
		what += " on " + c.Source
	}
	fs, err := fsopen(c.FSType)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", what, err)
	}
	defer fs.Close()
	if err := configure(fs, c); err != nil {
		return nil, fmt.Errorf("mount %s: %w: %s", what, err, words(fs, c))
	}
	d, err := fsmount(fs, what, c.Attr)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w: %s", what, err, words(fs, c))
	}
	return d, nil
}

// fsopen "creates a blank filesystem configuration context within the kernel for
// the filesystem named by fsname" fsopen(2)
func fsopen(fsType string) (*os.File, error) {
	fs, err := sys.Open("fsopen "+fsType, func() (int, error) { return unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC) })
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("fsopen: %w: this kernel does not know the filesystem; is a module missing?", err)
	}
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	return fs, nil
}

// configure sets all parameters and makes the superblock, or finds the one that
// the source has already.
//
// "FSCONFIG_CMD_CREATE: This command instructs the filesystem driver to
// instantiate an instance of the filesystem in the kernel with the parameters
// specified in the filesystem configuration context." fsconfig(2)
func configure(fs *os.File, c Config) error {
	parameters := c.Data
	if c.Source != "" {
		parameters = append([]string{"source=" + c.Source}, parameters...)
	}
	for _, p := range parameters {
		key, value, isString := strings.Cut(p, "=")
		err := sys.On(fs, func(fd int) error {
			if isString {
				return unix.FsconfigSetString(fd, key, value)
			}
			return unix.FsconfigSetFlag(fd, key)
		})
		if err != nil {
			return fmt.Errorf("option %q: %w", p, err)
		}
	}
	return sys.Effect("FSCONFIG_CMD_CREATE", fs, unix.FsconfigCreate)
}

// fsmount "takes the filesystem context [...] and creates a new detached mount
// object" fsmount(2)
func fsmount(fs *os.File, name string, a Attr) (*Detached, error) {
	root, err := sys.OpenAt(name, fs, func(fd int) (int, error) {
		if err := failpoint.Before("fsmount"); err != nil {
			return 0, err
		}
		return unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, int(a.bits()))
	})
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return &Detached{root}, nil
}

// words are what the kernel says about a failed context: "e", "w" or "i", a
// space, text; one message per read(2), then ENODATA. Most filesystems still
// tell what is wrong with a superblock to the kernel's log only.
func words(fs *os.File, c Config) string {
	var said []string
	buf := make([]byte, 4096)
	for {
		var n int
		err := sys.On(fs, func(fd int) (err error) {
			n, err = unix.Read(fd, buf)
			return err
		})
		if err != nil || n <= 0 {
			break
		}
		said = append(said, strings.TrimSpace(string(buf[:n])))
	}
	if len(said) == 0 {
		return fmt.Sprintf("the kernel's log may say more (dmesg | grep -i %s)", c.FSType)
	}
	return "the kernel says: " + strings.Join(said, "; ")
}

// Clone makes another mount of a file or directory: a bind mount, without what
// is mounted below. It has the attributes of the mount f was opened through. f
// may be open with O_PATH.
//
// "If OPEN_TREE_CLONE is specified, open_tree() creates a detached mount tree
// which consists of a bind-mount of the path specified" open_tree(2)
func Clone(f *os.File) (*Detached, error) {
	root, err := sys.OpenAt(f.Name(), f, func(fd int) (int, error) {
		if err := failpoint.Before("open_tree"); err != nil {
			return 0, err
		}
		return unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", f.Name(), err)
	}
	return &Detached{root}, nil
}

// File is the mount's root, open with O_PATH: for openat(2) below it, and fstat.
// It belongs to d.
func (d *Detached) File() *os.File { return d.root }

// Open opens a mount's root for reading, for ioctls on its filesystem. f is the
// root, open with O_PATH.
func Open(f *os.File) (*os.File, error) {
	root, err := sys.OpenAt(f.Name(), f, func(fd int) (int, error) {
		return unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: err}
	}
	return root, nil
}

// SetAttr adds attributes to a mount, and takes none away.
//
// "The mount_setattr() system call changes the mount properties of a mount [...]
// If attr_clr has MOUNT_ATTR__ATIME set" a new access time setting may be given,
// and must not be otherwise. mount_setattr(2)
func (d *Detached) SetAttr(a Attr) error {
	attr := unix.MountAttr{Attr_set: a.bits()}
	if a.NoATime {
		attr.Attr_clr = unix.MOUNT_ATTR__ATIME
	}
	err := sys.Effect("mount_setattr", d.root, func(fd int) error { return unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr) })
	if err != nil {
		return fmt.Errorf("mount_setattr %s: %w", d.root.Name(), err)
	}
	return nil
}

// Attach puts the mount on target, above what is mounted there already. Then
// only [UnmountTarget] ends it, after Close.
//
// "The move_mount() system call moves a mount from one place to another; it can
// also be used to attach an unattached mount" move_mount(2)
func (d *Detached) Attach(target *os.File) error {
	err := sys.On(d.root, func(fd int) error {
		return sys.Effect("move_mount", target, func(targetFd int) error {
			return unix.MoveMount(fd, "", targetFd, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		})
	})
	var hint string
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTDIR):
		hint = "; a file goes on a file, a directory on a directory, and only in our own mount namespace"
	case errors.Is(err, unix.ENOENT):
		hint = "; the target was removed meanwhile"
	}
	return fmt.Errorf("move_mount %s to %s: %w%s", d.root.Name(), target.Name(), err, hint)
}

// Close gives the descriptor back. That unmounts what was never attached.
func (d *Detached) Close() error { return d.root.Close() }
