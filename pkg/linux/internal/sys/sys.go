// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package sys is what the system call packages beside it have in common: the
// one place where EINTR is handled (signal(7), "Interruption of system calls").
package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
)

// Retry runs call until no signal interrupts it. The Go runtime preempts with
// signals, so that any blocking call may meet one.
func Retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// On runs call with f's descriptor, which neither Close nor the garbage
// collector can take away meanwhile, and retries it on EINTR.
func On(f *os.File, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	if err := conn.Control(func(fd uintptr) {
		callErr = Retry(func() error { return call(int(fd)) })
	}); err != nil {
		return os.ErrClosed // the only reason; as it comes it has no name
	}
	return callErr
}

// Effect is [On] for a call that changes what others can see, or what outlives this
// process; name is the call's.
func Effect(name string, f *os.File, call func(fd int) error) error {
	return On(f, func(fd int) error {
		if err := failpoint.Before(name); err != nil {
			return err
		}
		return call(fd)
	})
}

// Open is a call that returns a new descriptor, as a file with the given name.
func Open(name string, call func() (fd int, err error)) (*os.File, error) {
	var fd int
	err := Retry(func() (err error) {
		fd, err = call()
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// OpenAt is [Open] for a call that needs another file's descriptor.
func OpenAt(name string, at *os.File, call func(fd int) (int, error)) (*os.File, error) {
	var fd int
	err := On(at, func(atfd int) (err error) {
		fd, err = call(atfd)
		return err
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
