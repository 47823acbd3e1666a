// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package process finds processes by the files that they hold open, and kills them. It
// never kills another process that got the same number. It also starts this process anew.
//
// Caveat: it sees the processes that /proc shows. In a container without the node's PID
// namespace, these are the container's own.
//
// Sources: proc_pid_fd(5), pidfd_open(2), pidfd_send_signal(2), execve(2).
package process

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Process is a process that holds a file open.
type Process struct {
	PID  int
	File string // as /proc shows it: with " (deleted)" behind it if it has no name
}

// neverNamed matches the name under which /proc shows a file from O_TMPFILE: "#", the
// number of its inode, and " (deleted)". A file that lost its name is shown with that name.
var neverNamed = regexp.MustCompile(`^#[0-9]+ \(deleted\)$`)

// HoldingUnnamed lists the other processes that hold an unnamed file open which was made
// in the directory dir. Each is listed with the first such file.
func HoldingUnnamed(dir string) ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if file := unnamed(pid, dir); file != "" {
			found = append(found, Process{pid, file})
		}
	}
	return found, nil
}

// unnamed returns an unnamed file of dir that the process has open, or "" if there is
// none or the process ended.
func unnamed(pid int, dir string) string {
	// The paths in /proc are those of the process's own mount namespace, where another
	// directory may have the path of dir. So the filesystem must be dir's, too.
	var of unix.Stat_t
	if err := unix.Stat(dir, &of); err != nil {
		return ""
	}
	fds := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, _ := os.ReadDir(fds)
	for _, e := range entries {
		fd := filepath.Join(fds, e.Name())
		file, err := os.Readlink(fd)
		if err != nil || filepath.Dir(file) != dir || !neverNamed.MatchString(filepath.Base(file)) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(fd, &st); err == nil && st.Dev == of.Dev {
			return file
		}
	}
	return ""
}

// KillHolding sends SIGKILL to a process that still holds an unnamed file of the directory
// dir open, and reports whether it did so.
func KillHolding(pid int, dir string) (bool, error) {
	f, err := sys.Open("pidfd", func() (int, error) { return unix.PidfdOpen(pid, 0) })
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("pidfd_open", err)
	}
	defer f.Close()
	// The number may have gone to another process before pidfd_open. So the files are looked
	// at again now: while the descriptor is open, the number stays with its process.
	if unnamed(pid, dir) == "" {
		return false, nil
	}
	err = sys.Effect("pidfd_send_signal", f, func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	return err == nil, os.NewSyscallError("pidfd_send_signal", err)
}

// Restart runs this program again in this process, with the same arguments and environment. It
// returns only if that fails. The namespaces are those of the calling thread.
//
// "All threads other than the calling thread are destroyed during an execve()." execve(2)
func Restart() error {
	err := unix.Exec("/proc/self/exe", os.Args, os.Environ())
	return &os.PathError{Op: "execve", Path: "/proc/self/exe", Err: err}
}
