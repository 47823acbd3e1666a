// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// HoldingNamed lists the other processes that hold a file open whose path ends with the given one, which begins with a
// slash. Each is listed with the first such file, whose path is that in the process's own mount namespace.
func HoldingNamed(end string) ([]Process, error) {
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
		fds, _ := filepath.Glob(filepath.Join("/proc", e.Name(), "fd", "*"))
		for _, fd := range fds {
			if file, err := os.Readlink(fd); err == nil && strings.HasSuffix(file, end) {
				found = append(found, Process{pid, file})
				break
			}
		}
	}
	return found, nil
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
