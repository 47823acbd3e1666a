// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package lease asks the kernel whether anybody else has a file open, in whatever namespace, by
// taking a lease on the file and giving it back.
//
// Caveat: who has it open, the kernel does not say.
//
// Sources: F_SETLEASE in fcntl(2), check_conflicting_open in fs/locks.c.
package lease

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrOpen means that somebody else has the file open.
var ErrOpen = errors.New("somebody else has the file open")

// Sole returns nil if nobody but f has its file open, or [ErrOpen]. Another error proves nothing: the
// filesystem may have no leases, or the file may belong to another user, which needs CAP_LEASE. f is
// open for reading and writing. It takes 1 µs.
//
// "F_WRLCK: Take out a write lease. [...] A write lease may be placed on a file only if there
// are no other open file descriptors for the file." F_SETLEASE in fcntl(2). What counts are open
// file descriptions, be it by a mapping of the file alone.
//
// The lease is given back at once. Whoever opens the file meanwhile waits that long, or gets
// EWOULDBLOCK with O_NONBLOCK: package openat tries again. The holder gets SIGIO, which Go
// ignores.
func Sole(f *os.File) error {
	err := sys.On(f, func(fd int) error {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			return err
		}
		_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
		return err
	})
	if errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%w: %s", ErrOpen, f.Name())
	}
	return os.NewSyscallError("fcntl F_SETLEASE", err)
}
