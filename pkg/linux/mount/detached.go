// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Attr holds the attributes of a mount, as opposed to those of its filesystem:
// MOUNT_ATTR_* in mount_setattr(2). mount(8) calls the zero value
// rw,suid,dev,exec,relatime.
type Attr struct {
	ReadOnly, NoSUID, NoDev, NoExec, NoATime bool
}

// attributes has one row for each field of [Attr], in the forms that the kernel has for it.
var attributes = []struct {
	word  string // in proc_pid_mountinfo(5), field 6
	bit   uint64
	field func(*Attr) *bool
}{
	{"ro", unix.MOUNT_ATTR_RDONLY, func(a *Attr) *bool { return &a.ReadOnly }},
	{"nosuid", unix.MOUNT_ATTR_NOSUID, func(a *Attr) *bool { return &a.NoSUID }},
	{"nodev", unix.MOUNT_ATTR_NODEV, func(a *Attr) *bool { return &a.NoDev }},
	{"noexec", unix.MOUNT_ATTR_NOEXEC, func(a *Attr) *bool { return &a.NoExec }},
	{"noatime", unix.MOUNT_ATTR_NOATIME, func(a *Attr) *bool { return &a.NoATime }},
}

func (a Attr) bits() (bits uint64) {
	for _, row := range attributes {
		if *row.field(&a) {
			bits |= row.bit
		}
	}
	return bits
}

func attrOfBits(bits uint64) (a Attr) {
	for _, row := range attributes {
		*row.field(&a) = bits&row.bit != 0
	}
	return a
}

func attrOfWords(options string) (a Attr) {
	words := strings.Split(options, ",")
	for _, row := range attributes {
		*row.field(&a) = slices.Contains(words, row.word)
	}
	return a
}

// Config is a filesystem to mount.
type Config struct {
	FSType string
	// Source is the path of a block device. It is empty for filesystems that have none. Below
	// /dev the kernel's own node is meant, whatever /dev is: see package devfs.
	Source string
	// Data holds the filesystem's own options, "key" or "key=value". "ro" makes the
	// superblock read-only, while Attr.ReadOnly makes only this mount read-only.
	Data []string
	Attr Attr
}

// Detached is a mount that no path leads to. Close unmounts it, unless it was attached.
type Detached struct{ root *os.File }

// New mounts a filesystem. An error includes the kernel's own messages, if there are any.
func New(c Config) (*Detached, error) {
	if needsText(c) {
		return newByText(c)
	}
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

// configure sets all parameters and makes the superblock. If the source is mounted
// already, it uses the superblock of that mount.
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
	return devfs.At(c.Source, func() error { return sys.Effect("FSCONFIG_CMD_CREATE", fs, unix.FsconfigCreate) })
}

// fsmount "takes the filesystem context [...] and creates a new detached mount
// object" fsmount(2)
func fsmount(fs *os.File, name string, a Attr) (*Detached, error) {
	root, err := sys.OpenAtEffect("fsmount", name, fs, func(fd int) (int, error) {
		return unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, int(a.bits()))
	})
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	return &Detached{root}, nil
}

// words returns the kernel's messages about a failed context. Each read(2) returns one
// message, which is "e", "w" or "i", a space and text; the last one fails with ENODATA.
// Most filesystems still report a bad superblock only in the kernel's log.
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

// Clone makes another mount of a file or directory: a bind mount, without the mounts
// below it. It has the attributes of the mount through which f was opened. f may be open
// with O_PATH.
//
// "If OPEN_TREE_CLONE is specified, open_tree() creates a detached mount tree
// which consists of a bind-mount of the path specified" open_tree(2)
func Clone(f *os.File) (*Detached, error) {
	root, err := sys.OpenAtEffect("open_tree", f.Name(), f, func(fd int) (int, error) {
		return unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	})
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", f.Name(), err)
	}
	return &Detached{root}, nil
}

// CloneNode is [Clone] of the kernel's own node of a device, whatever /dev is: see package
// devfs. The path is one below /dev.
func CloneNode(path string) (*Detached, error) {
	var root *os.File
	err := devfs.At(path, func() (err error) {
		root, err = sys.OpenEffect("open_tree", path, func() (int, error) {
			return unix.OpenTree(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", path, err)
	}
	return &Detached{root}, nil
}

// File returns the mount's root, open with O_PATH, for openat(2) below it and for fstat.
// It belongs to d.
func (d *Detached) File() *os.File { return d.root }

// Open opens the root of a mount for reading, so that it can take ioctls. f is the same
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

// SetAttr adds attributes to a mount. It never removes any.
//
// "The mount_setattr() system call changes the mount properties of a mount or an entire
// mount tree." An access time setting in attr_set needs MOUNT_ATTR__ATIME in attr_clr.
// mount_setattr(2)
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

// Attach puts the mount on target, on top of any mount that is there. After that it
// takes Close and then [UnmountTarget] to end it.
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
		hint = "; a file can be mounted only on a file, a directory only on a directory, and both only in the plugin's own mount namespace"
	case errors.Is(err, unix.ENOENT):
		hint = "; the target was removed meanwhile"
	}
	return fmt.Errorf("move_mount %s to %s: %w%s", d.root.Name(), target.Name(), err, hint)
}

// Close closes the descriptor, which unmounts a mount that was never attached.
func (d *Detached) Close() error { return d.root.Close() }
