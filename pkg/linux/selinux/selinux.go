// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package selinux tells whether the kernel has SELinux enabled, and reads and writes the labels of
// single files. A label is a security context, as user:role:type:level.
//
// Labels of whole filesystems are a mount option, context=, and not in this package.
//
// Caveat: labels are data of a filesystem. One that is mounted with context= neither shows nor
// takes them.
//
// Sources: selinux(8), mount(8) (context=), xattr(7), security/selinux/selinuxfs.c in the kernel.
package selinux

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/xattr"
)

// attribute has a file's label, with a zero byte behind it, as libselinux writes it.
const attribute = "security.selinux"

// maxLabel is a page, in bytes: selinuxfs takes no longer contexts.
const maxLabel = 4 << 10

// Enabled reports whether the kernel was booted with SELinux. It asks once: the answer stays the
// same until the next boot. It does not say that a policy is loaded or enforced.
//
// "/proc/filesystems: A text listing of the filesystems which are supported by the kernel".
// proc_filesystems(5). The kernel registers selinuxfs only if SELinux is enabled
// (init_sel_fs in security/selinux/selinuxfs.c).
var Enabled = sync.OnceValues(func() (bool, error) {
	b, err := os.ReadFile("/proc/filesystems")
	return listed(string(b)), err
})

// listed reports whether a list of filesystems has that of SELinux.
func listed(filesystems string) bool {
	for line := range strings.Lines(filesystems) {
		if _, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t"); name == "selinuxfs" {
			return true
		}
	}
	return false
}

// Label returns the label of a file, or "" if it has none.
func Label(f *os.File) (string, error) {
	value, err := xattr.Get(f, attribute, maxLabel)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	return string(bytes.TrimRight(value, "\x00")), err
}

// SetLabel labels a file. A context that the loaded policy does not know returns
// [syscall.EINVAL], and a filesystem that takes no labels [syscall.EOPNOTSUPP].
func SetLabel(f *os.File, context string) error {
	return xattr.Set(f, attribute, append([]byte(context), 0))
}
