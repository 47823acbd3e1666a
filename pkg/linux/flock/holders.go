// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package flock

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Holders describes the processes that hold the lock of the file at path, for a
// message: "pid=7 cmd=…". It knows those that /proc/locks and /proc/<pid> show.
func Holders(path string) string {
	const unknown = "a process that /proc does not show here (in another PID namespace?)"
	fi, err := os.Stat(path)
	if err != nil {
		return unknown
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return unknown
	}
	var found []string
	for _, pid := range flockHolders(string(locks), fi.Sys().(*syscall.Stat_t).Ino) {
		if !hasOpen(pid, fi) {
			continue
		}
		cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		cmd = bytes.ReplaceAll(bytes.TrimRight(cmd, "\x00"), []byte{0}, []byte{' '})
		found = append(found, fmt.Sprintf("pid=%d cmd=%s", pid, cmd))
	}
	if len(found) == 0 {
		return unknown
	}
	return strings.Join(found, ", ")
}

// flockHolders parses proc_locks(5):
//
//	1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
//
// The line of a process that waits has "->" after the number. The device is not
// compared: on btrfs it is not the one that stat(2) shows. So other files with the
// same inode number are included, and [hasOpen] tells them apart.
func flockHolders(locks string, inode uint64) []int {
	var pids []int
	for line := range strings.Lines(locks) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(inode, 10)) {
			continue
		}
		if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// hasOpen reports whether a process has the file open.
func hasOpen(pid int, file os.FileInfo) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if fi, err := os.Stat(fd); err == nil && os.SameFile(fi, file) {
			return true
		}
	}
	return false
}
