// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// HoldingNamed lists the other processes that hold a file open whose path ends with the given one, which begins with a
// slash. Each is listed with the first such file, whose path is that in the process's own mount namespace. Only processes
// and files of root and of this process's own user count: anybody may give a file any name, and start a program of root's
// with that file open.
func HoldingNamed(end string) ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !trusted(filepath.Join("/proc", e.Name())) {
			continue
		}
		fds, _ := filepath.Glob(filepath.Join("/proc", e.Name(), "fd", "*"))
		for _, fd := range fds {
			if file, err := os.Readlink(fd); err == nil && strings.HasSuffix(file, end) && trusted(fd) {
				found = append(found, Process{pid, file})
				break
			}
		}
	}
	return found, nil
}

// trusted reports whether what is at a path is root's or this process's own user's. A process's directory in /proc has
// the owner that the process has in effect (proc_pid(5)). A file on a dead disk has no owner any more.
func trusted(path string) bool {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	return errors.Is(err, unix.EIO) || err == nil && (st.Uid == 0 || int(st.Uid) == os.Geteuid())
}

// Holding lists the processes that hold a file open, under whatever name, this one among them: each with
// its descriptors of the file, as paths in /proc.
func Holding(file os.FileInfo) (map[int][]string, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	found := map[int][]string{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fds, _ := filepath.Glob(filepath.Join("/proc", e.Name(), "fd", "*"))
		for _, fd := range fds {
			if fi, err := os.Stat(fd); err == nil && os.SameFile(fi, file) {
				found[pid] = append(found[pid], fd)
			}
		}
	}
	return found, nil
}

// Arguments returns the command line of a process, or nothing if it ended.
func Arguments(pid int) []string {
	return words(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
}

// Variable returns a variable of the environment that a process was started with, or "".
func Variable(pid int, name string) string {
	for _, word := range words(filepath.Join("/proc", strconv.Itoa(pid), "environ")) {
		if value, ok := strings.CutPrefix(word, name+"="); ok {
			return value
		}
	}
	return ""
}

// words reads a file of proc(5) in which each word ends with a NUL.
func words(file string) []string {
	b, err := os.ReadFile(file)
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
