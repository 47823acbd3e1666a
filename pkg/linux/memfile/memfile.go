// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package memfile makes files that live in memory and have no name. A child gets them as
// descriptors.
//
// Source: memfd_create(2).
package memfile

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// New returns an empty file for reading and writing. It is gone with its last descriptor.
// Only /proc shows the name.
//
// Caveat: what is written counts as the memory of this process's cgroup until then, and not
// as that of the process.
//
// "memfd_create() creates an anonymous file and returns a file descriptor that refers to
// it." memfd_create(2)
func New(name string) (*os.File, error) {
	f, err := sys.Open(name, func() (int, error) { return unix.MemfdCreate(name, unix.MFD_CLOEXEC) })
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return f, nil
}
