// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package devfs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// once is a file that this process opens when it needs it for the first time, and then keeps.
// After an error the next call tries again.
type once struct {
	sync.Mutex
	file *os.File
	make func() (*os.File, error)
}

func (o *once) get() (*os.File, error) {
	o.Lock()
	defer o.Unlock()
	if o.file != nil {
		return o.file, nil
	}
	f, err := o.make()
	if err != nil {
		return nil, err
	}
	o.file = f
	return f, nil
}

var (
	root      = once{make: mountDetached}
	namespace = once{make: makeNamespace}
)

// mountDetached mounts devtmpfs at no path. There is one devtmpfs per kernel, whoever mounts
// it. Nothing here is announced as an effect, since nobody else sees it and it ends with the
// process.
func mountDetached() (*os.File, error) {
	fs, err := sys.Open("fsopen devtmpfs", func() (int, error) { return unix.Fsopen("devtmpfs", unix.FSOPEN_CLOEXEC) })
	if err != nil {
		return nil, explain("fsopen", err)
	}
	defer fs.Close()
	if err := sys.On(fs, unix.FsconfigCreate); err != nil {
		return nil, explain("FSCONFIG_CMD_CREATE", err)
	}
	root, err := sys.OpenAt("/dev", fs, func(fd int) (int, error) {
		return unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	})
	if err != nil {
		return nil, explain("fsmount", err)
	}
	return root, nil
}

func explain(call string, err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = "; run the container privileged, and not in a user namespace (rootless)"
	case errors.Is(err, unix.ENODEV):
		hint = "; the kernel needs CONFIG_DEVTMPFS"
	case errors.Is(err, unix.ENOSYS):
		hint = "; this needs Linux 5.12"
	}
	return fmt.Errorf("mount the kernel's device nodes (devtmpfs): %s: %w%s", call, err, hint)
}

// Open opens the kernel's node of a device: openat(2). Its name is that in /dev, as "loop7".
func Open(name string, flags int) (*os.File, error) {
	dir, err := root.get()
	if err != nil {
		return nil, err
	}
	path := "/dev/" + name
	f, err := sys.OpenAt(path, dir, func(fd int) (int, error) { return unix.Openat(fd, name, flags|unix.O_CLOEXEC, 0) })
	switch {
	case errors.Is(err, unix.EPERM): // the answer of a device cgroup
		return nil, fmt.Errorf("open %s: %w: this process may not use the device; run the container privileged", path, err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return f, nil
}

// Private reports whether /dev of this process is not the kernel's, so that new devices do not appear in it.
func Private() (bool, error) {
	dir, err := root.get()
	if err != nil {
		return false, err
	}
	var theirs, here unix.Stat_t
	if err := sys.On(dir, func(fd int) error { return unix.Fstat(fd, &theirs) }); err != nil {
		return false, os.NewSyscallError("fstat", err)
	}
	if err := sys.Retry(func() error { return unix.Stat("/dev", &here) }); err != nil {
		return false, &os.PathError{Op: "stat", Path: "/dev", Err: err}
	}
	return theirs.Dev != here.Dev, nil
}

// Stat returns the status of the kernel's node, if the path is below /dev. If this process may
// not mount devtmpfs, or if the path is elsewhere, it is the status of what is at the path.
func Stat(path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	name, inDev := strings.CutPrefix(path, "/dev/")
	var err error
	if inDev {
		err = kernels(name, &st)
	}
	if !inDev || errors.Is(err, unix.EPERM) {
		err = sys.Retry(func() error { return unix.Stat(path, &st) })
	}
	if err != nil {
		return st, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st, nil
}

// kernels returns the status of the kernel's own node.
func kernels(name string, st *unix.Stat_t) error {
	dir, err := root.get()
	if err != nil {
		return err
	}
	return sys.On(dir, func(fd int) error { return unix.Fstatat(fd, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

// At runs f where a path below /dev leads to the kernel's node: in this process's own mount
// namespace if it does so there, or else on a thread in another mount namespace. f may change
// what a file descriptor refers to, and must use no other path. For a path elsewhere, and for
// one where the kernel has no node, At just runs f.
func At(path string, f func() error) error {
	name, ok := strings.CutPrefix(path, "/dev/")
	if !ok {
		return f()
	}
	var theirs, here unix.Stat_t
	err := kernels(name, &theirs)
	if errors.Is(err, unix.ENOENT) {
		return f()
	}
	if err != nil {
		return err
	}
	err = sys.Retry(func() error { return unix.Stat(path, &here) })
	if err == nil && here.Dev == theirs.Dev && here.Ino == theirs.Ino {
		return f()
	}
	return within(f)
}

// within runs f in the namespace that holds nothing but /dev.
func within(f func() error) error {
	ns, err := namespace.get()
	if err != nil {
		return err
	}
	return sys.OnThread(func() error {
		// A thread that shares its root directory with others cannot change its mount
		// namespace: setns(2).
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare(CLONE_FS): %w", err)
		}
		if err := sys.On(ns, func(fd int) error { return unix.Setns(fd, unix.CLONE_NEWNS) }); err != nil {
			return fmt.Errorf("enter the mount namespace with the kernel's device nodes: setns: %w", err)
		}
		return f()
	})
}

// newRoot is where the root of the namespace is built. Any directory that exists on every
// machine will do, since it is hidden only there.
const newRoot = "/proc"

// makeNamespace makes a mount namespace that holds a devtmpfs at /dev and nothing else, so
// that it keeps no other mount alive. It lasts as long as its descriptor.
func makeNamespace() (*os.File, error) {
	var ns *os.File
	err := sys.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare(CLONE_NEWNS): %w", err)
		}
		const this = "/proc/thread-self/ns/mnt"
		ns, err = sys.Open(this, func() (int, error) { return unix.Open(this, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
		if err != nil {
			return fmt.Errorf("open %s: %w", this, err)
		}
		return furnish()
	})
	if err != nil {
		if ns != nil {
			ns.Close()
		}
		return nil, fmt.Errorf("make a mount namespace for the kernel's device nodes: %w", err)
	}
	return ns, nil
}

func furnish() error {
	// Slaves: nothing that is done here reaches the machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("making mounts slaves: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", newRoot, "tmpfs", flags, "size=4096,nr_inodes=2,mode=0755"); err != nil {
		return fmt.Errorf("mounting tmpfs: %w", err)
	}
	if err := os.Mkdir(newRoot+"/dev", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("devtmpfs", newRoot+"/dev", "devtmpfs", flags, ""); err != nil {
		return fmt.Errorf("mounting devtmpfs: %w", err)
	}
	return sys.PivotTo(newRoot)
}
