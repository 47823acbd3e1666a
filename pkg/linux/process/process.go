// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package process finds processes by the files that they hold open, and ends them
// without ever meeting another that got their number.
//
// Caveat: it sees what /proc shows: in a container, the container's own processes,
// unless it has the node's PID namespace.
//
// Sources: proc_pid_fd(5), pidfd_open(2), pidfd_send_signal(2).
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

// Process is one that holds a file open.
type Process struct {
	PID  int
	File string // as /proc names it, with " (deleted)" where it has no name
}

// neverNamed is how /proc shows a file from O_TMPFILE: its inode's number for a name, and
// that it has none. One that lost its name is shown with that.
var neverNamed = regexp.MustCompile(`^#[0-9]+ \(deleted\)$`)

// HoldingUnnamed lists the processes, this one aside, that hold a file without a name
// open which was made in a directory: each with the first such file.
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

// unnamed returns a file without a name in dir that a process has open, or "". A
// process that ends meanwhile has none.
func unnamed(pid int, dir string) string {
	// A path is that of the process's own mount namespace, where another directory may
	// have the same: the filesystem must be dir's, too.
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

// KillHolding ends a process by SIGKILL if it still holds an unnamed file of the
// directory open, and reports whether it did.
func KillHolding(pid int, dir string) (bool, error) {
	f, err := sys.Open("pidfd", func() (int, error) { return unix.PidfdOpen(pid, 0) })
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("pidfd_open", err)
	}
	defer f.Close()
	// The descriptor is of whoever has the number now: asked again, it is of whoever
	// has it as long as the descriptor is open.
	if unnamed(pid, dir) == "" {
		return false, nil
	}
	err = sys.Effect("pidfd_send_signal", f, func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	return err == nil, os.NewSyscallError("pidfd_send_signal", err)
}
