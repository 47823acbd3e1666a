// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package cage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrBuild means that the cage could not be put together: nothing was started.
var ErrBuild = errors.New("cannot build a cage")

// Spec says what the program will find in its cage.
type Spec struct {
	UID, GID uint32            // who it runs as; no supplementary groups
	Binds    map[string]string // path in the cage → file or directory of the machine, read-only
	Symlinks map[string]string // path in the cage → target
	Files    map[string][]byte // path in the cage → content, mode 0444
	Devices  []string          // device nodes of the machine, at the same path, owned by UID whatever their mode is outside
	Limits   Limits
}

// Run starts cmd in the cage and waits for it, as [exec.Cmd.Run] does. It needs
// CAP_SYS_ADMIN, CAP_SETUID and CAP_MKNOD. cmd.SysProcAttr is set here. The
// program is killed when this process dies.
//
// started, if not nil, is called once the program runs, within its limits.
func Run(cmd *exec.Cmd, s Spec, started func()) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread, and with it the namespace, ends with the goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// But the main thread would not end, and what /proc says of its namespaces it
			// says of the process. While it is held here, it must be another.
			defer runtime.UnlockOSThread()
			result <- Run(cmd, s, started)
			return
		}
		result <- run(cmd, s, started)
	}()
	return <-result
}

func run(cmd *exec.Cmd, s Spec, started func()) error {
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
	if started != nil {
		started()
	}
	return cmd.Wait()
}

// newRoot is where the new root is put together. Any directory that exists on
// every machine will do: it is hidden in this thread's namespace only.
const newRoot = "/proc"

// build gives the calling thread a mount namespace that holds the cage alone.
func build(s Spec) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare(CLONE_NEWNS): %w; root needs CAP_SYS_ADMIN here: run the container privileged", err)
	}
	// What is made here is for another user to read, whatever umask root has.
	// Unsharing the namespace has made the umask this thread's own as well.
	unix.Umask(0)
	// Nothing done here may reach the machine; but what the machine unmounts until
	// the old root is dropped below goes away here too, where it is shared.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("making mounts slaves: %w", err)
	}
	if err := unix.Mount("tmpfs", newRoot, "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return fmt.Errorf("mounting tmpfs: %w", err)
	}
	if err := furnish(s); err != nil {
		return err
	}
	// pivot_root(".", ".") stacks the old root on the new one; pivot_root(2), NOTES.
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("dropping the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
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

// write makes a file while nobody forks. A child of another thread would have a copy
// of the open descriptor until its execve, and the root does not become read-only
// while a file on it is open for writing: EBUSY.
func write(path string, content []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, content, 0o444)
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

// device makes a node of the cage's own: the machine's may be 0600 root or
// 0660 root:kvm, and its permissions are none of the cage's business.
func device(source, target string, s Spec) error {
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil {
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
