// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package sys makes the system calls of the packages in pkg/linux. It is the one
// place that handles EINTR (signal(7), "Interruption of system calls") and that
// announces effects to internal/failpoint.
//
// An effect is a call that changes what outlives this process, or what others can
// see. It has the name of its call, and it is announced before every attempt.
package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
)

// Retry repeats call as long as a signal interrupts it. The Go runtime preempts
// goroutines with signals, so any call that blocks can be interrupted.
func Retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// On runs call with f's descriptor and retries it on EINTR. Neither Close nor the
// garbage collector can take the descriptor away meanwhile.
func On(f *os.File, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	if err := conn.Control(func(fd uintptr) {
		callErr = Retry(func() error { return call(int(fd)) })
	}); err != nil {
		return os.ErrClosed // the only reason; Control's own error wraps no sentinel
	}
	return callErr
}

// Effect is [On] for a call that is an effect.
func Effect(name string, f *os.File, call func(fd int) error) error {
	return On(f, func(fd int) error { return announced(name, func() error { return call(fd) }) })
}

// PathEffect is [Effect] for a call that takes paths, or that goes through package os.
func PathEffect(name string, call func() error) error {
	return Retry(func() error { return announced(name, call) })
}

func announced(name string, call func() error) error {
	if err := failpoint.Before(name); err != nil {
		return err
	}
	return call()
}

// Open runs a call that returns a new descriptor. It returns the descriptor as a
// file with the given name.
func Open(name string, call func() (fd int, err error)) (*os.File, error) {
	var fd int
	err := Retry(func() (err error) {
		fd, err = call()
		return err
	})
	return file(fd, name, err)
}

// OpenEffect is [Open] for a call that is an effect.
func OpenEffect(effect, name string, call func() (fd int, err error)) (*os.File, error) {
	var fd int
	err := PathEffect(effect, func() (err error) {
		fd, err = call()
		return err
	})
	return file(fd, name, err)
}

// OpenAt is [Open] for a call that needs the descriptor of another file.
func OpenAt(name string, at *os.File, call func(atFD int) (fd int, err error)) (*os.File, error) {
	var fd int
	err := On(at, func(atFD int) (err error) {
		fd, err = call(atFD)
		return err
	})
	return file(fd, name, err)
}

// OpenAtEffect is [OpenAt] for a call that is an effect.
func OpenAtEffect(effect, name string, at *os.File, call func(atFD int) (fd int, err error)) (*os.File, error) {
	var fd int
	err := Effect(effect, at, func(atFD int) (err error) {
		fd, err = call(atFD)
		return err
	})
	return file(fd, name, err)
}

func file(fd int, name string, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
