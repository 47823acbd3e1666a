// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"os"
	"path/filepath"
	"strconv"

	"github.com/moby/sys/mountinfo"
)

// Bind is a bind mount of a file, in any mount namespace.
type Bind struct {
	PID        int    // a process that has it; 0 for this process's namespace
	Mountpoint string // as that process sees it
}

// BindsOf lists the bind mounts of a file: those of this process's mount namespace, or, if there are
// none, those of other namespaces. It finds the namespaces of the processes that /proc shows, which in
// a container without the node's PID namespace are the container's own. f is below the root of a mount
// that this process sees, or BindsOf returns [ErrNotMounted].
//
// A mount is recognised by its filesystem's device number and by the file's path in it. "root: the
// pathname of the directory in the filesystem which forms the root of this mount."
// proc_pid_mountinfo(5)
func BindsOf(f *os.File) ([]Bind, error) {
	on, err := Holding(f)
	if err != nil {
		return nil, err
	}
	_, path, err := whereIs(f)
	if err != nil {
		return nil, err
	}
	rel, err := filepath.Rel(on.Mountpoint, path)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(on.Root, rel)
	is := func(m *mountinfo.Info) bool { return m.Root == root && m.Major == on.Major && m.Minor == on.Minor }
	text := filepath.Base(root)
	here, err := List(is, text)
	if err != nil || len(here) > 0 {
		return binds(0, here), err
	}
	return elsewhere(is, text)
}

// elsewhere searches the mount tables of other mount namespaces, each once.
func elsewhere(is func(*mountinfo.Info) bool, text string) ([]Bind, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []Bind
	seen := map[string]bool{own: true}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		ns, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || seen[ns] { // it ended, is the kernel's, or nothing new
			continue
		}
		table, err := os.ReadFile(filepath.Join(dir, "mountinfo"))
		if err != nil {
			continue
		}
		seen[ns] = true
		mounts, err := search(table, is, []string{text})
		if err != nil {
			return nil, err
		}
		found = append(found, binds(pid, mounts)...)
	}
	return found, nil
}

func binds(pid int, mounts []*mountinfo.Info) (found []Bind) {
	for _, m := range mounts {
		found = append(found, Bind{pid, m.Mountpoint})
	}
	return found
}
