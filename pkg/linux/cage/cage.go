// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package cage

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrBuild means that the cage could not be built. The program did not run, or it was
// killed because its limits could not be set.
var ErrBuild = errors.New("cannot build a cage")

// Spec describes a cage.
type Spec struct {
	UID, GID uint32                   // the program runs as these, without supplementary groups
	Binds    map[string]string        // path in the cage → file or directory of the machine, read-only
	Symlinks map[string]string        // path in the cage → target
	Files    map[string]io.ReadCloser // path in the cage → content, mode 0444; it is read to its end and closed; nil is empty
	Devices  []string                 // device nodes of the machine, at the same path, owned by UID whatever their mode is outside
	Limits   Limits
}

// Run starts cmd in the cage and waits for it, as [exec.Cmd.Run] does. It needs
// CAP_SYS_ADMIN, CAP_SETUID and CAP_MKNOD. It sets cmd.SysProcAttr. The
// program is killed when this process dies.
func Run(cmd *exec.Cmd, s Spec) error {
	return sys.OnThread(func() error { return run(cmd, s) })
}

func run(cmd *exec.Cmd, s Spec) error {
	if err := build(s); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrBuild, cmd.Path, err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID,
		Credential: &syscall.Credential{Uid: s.UID, Gid: s.GID},
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := s.Limits.set(cmd.Process.Pid, s.UID, s.GID); err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("%w: %s: %w", ErrBuild, cmd.Path, err)
	}
	return cmd.Wait()
}

// newRoot is the directory on which the new root is built. Any directory that exists on
// every machine will do, since it is hidden only in this thread's namespace.
const newRoot = "/proc"

// build gives the calling thread a mount namespace that holds the cage alone.
func build(s Spec) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare(CLONE_NEWNS): %w; root needs CAP_SYS_ADMIN here: run the container privileged", err)
	}
	// Another user must be able to read what is made here, whatever umask root has.
	// Unsharing the namespace made the umask this thread's own too.
	unix.Umask(0)
	// Slaves: nothing that is done here reaches the machine. But what the machine unmounts
	// before the old root is dropped below is unmounted here too, if its mount is shared.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("making mounts slaves: %w", err)
	}
	if err := unix.Mount("tmpfs", newRoot, "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return fmt.Errorf("mounting tmpfs: %w", err)
	}
	if err := furnish(s); err != nil {
		return err
	}
	if err := sys.PivotTo(newRoot); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("making the root read-only: %w", err)
	}
	return nil
}

func furnish(s Spec) error {
	for at, source := range s.Binds {
		if err := bind(source, newRoot+at); err != nil {
			return fmt.Errorf("binding %s: %w", source, err)
		}
	}
	for at, target := range s.Symlinks {
		if err := errors.Join(parent(newRoot+at), os.Symlink(target, newRoot+at)); err != nil {
			return err
		}
	}
	for at, content := range s.Files {
		if err := errors.Join(parent(newRoot+at), write(newRoot+at, content)); err != nil {
			return err
		}
	}
	for _, dev := range append([]string{os.DevNull}, s.Devices...) {
		if err := device(dev, newRoot+dev, s); err != nil {
			return fmt.Errorf("device node %s: %w", dev, err)
		}
	}
	return nil
}

// write makes a file while nobody forks. A child of another thread would have a copy of
// the open descriptor until its execve, and as long as a file is open for writing, its
// mount cannot become read-only (EBUSY).
func write(path string, content io.ReadCloser) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o444)
	if err != nil {
		return err
	}
	if content != nil {
		_, err = io.Copy(f, content)
		err = errors.Join(err, content.Close())
	}
	return errors.Join(err, f.Close())
}

func parent(path string) error { return os.MkdirAll(filepath.Dir(path), 0o755) }

func bind(source, target string) error {
	fi, err := os.Stat(source)
	if err != nil {
		return err
	}
	if fi.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else if err = parent(target); err == nil {
		err = write(target, nil)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	const flags = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	return unix.Mount("", target, "", flags, "")
}

// device makes the cage's own node of a device. The machine's node may be 0600 root or
// 0660 root:kvm, and stays as it is.
func device(source, target string, s Spec) error {
	st, err := devfs.Stat(source)
	if err != nil {
		return err
	}
	if err := parent(target); err != nil {
		return err
	}
	if err := unix.Mknod(target, st.Mode&unix.S_IFMT|0o600, int(st.Rdev)); err != nil {
		return err
	}
	return os.Chown(target, int(s.UID), int(s.GID))
}
