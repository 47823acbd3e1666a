// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
)

// Under tells which loop device a filesystem is on, given the device number and the source of
// its mount in proc_pid_mountinfo(5). It is -1 if there is none. whole is false if the
// filesystem has only a part of the loop device, or has it through the device mapper.
//
// A btrfs has a device number of its own, so its source tells.
//
// Source: Documentation/ABI/testing/sysfs-dev, and slaves in sysfs-block.
func Under(major, minor int, source string) (index int, whole bool) {
	if major == 0 {
		st, err := devfs.Stat(source)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return -1, false
		}
		major, minor = int(unix.Major(uint64(st.Rdev))), int(unix.Minor(uint64(st.Rdev)))
	}
	return under(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
}

// under is [Under] for the directory of a block device in sysfs.
func under(dir string) (index int, whole bool) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return -1, false
	}
	if index, ok := IndexOf("/dev/" + filepath.Base(real)); ok {
		return index, true
	}
	if index, ok := IndexOf("/dev/" + filepath.Base(filepath.Dir(real))); ok { // a partition
		return index, false
	}
	slaves, err := os.ReadDir(filepath.Join(real, "slaves")) // what the device mapper maps to
	if err != nil {
		return -1, false
	}
	for _, s := range slaves {
		if index, _ := under(filepath.Join(real, "slaves", s.Name())); index >= 0 {
			return index, false
		}
	}
	return -1, false
}
