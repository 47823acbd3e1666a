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

// New returns a file with the given content. It is gone with its last descriptor. Only
// /proc shows the name.
//
// "memfd_create() creates an anonymous file and returns a file descriptor that refers to
// it." memfd_create(2)
func New(name string, content []byte) (*os.File, error) {
	f, err := sys.Open(name, func() (int, error) { return unix.MemfdCreate(name, unix.MFD_CLOEXEC) })
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	if _, err := f.WriteAt(content, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
