// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package flock takes exclusive locks of files and tells who holds them.
//
// The kernel releases a lock when the last copy of its descriptor is closed, so a
// process that dies releases its locks, however it dies. A held lock is therefore
// a proof of life, which a process ID is not.
//
// A lockfile is made when it is first needed and never deleted. A process that
// waits for a deleted lockfile would share its lock with nobody.
//
// Caveats: a lock belongs to the open file description. A child between fork and
// execve has a copy of the descriptor, so the lock of a process that was just
// killed can stay held for a moment. A lock is advisory: it stops only those who ask.
// On a network filesystem other nodes may not see it.
//
// Sources: flock(2), proc_locks(5).
package flock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrLocked means that somebody else holds the lock.
var ErrLocked = errors.New("lock is held")

// Lock opens the lockfile at path, makes it if there is none, and waits for its
// lock until ctx ends. It tries again after each pause of the length poll, and not
// at all if ctx has ended already. [Unlock] or Close of the file releases the lock.
//
// Errors are [ErrLocked] with the file's name and ctx's cause, or the failure to
// make or open the file.
//
// Lock is announced as one effect, since it may make the file. Its attempts are
// not announced: how many there are depends on the clock.
func Lock(ctx context.Context, path string, poll time.Duration) (*os.File, error) {
	if ctx.Err() != nil {
		return nil, &os.PathError{Op: "flock", Path: path, Err: context.Cause(ctx)}
	}
	f, err := sys.OpenEffect("flock", path, func() (int, error) { return create(path) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := Wait(ctx, f, poll); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// TryLock is [Lock] with a single attempt: it returns [ErrLocked] if the lock is
// held. It is not announced as an effect.
func TryLock(path string) (*os.File, error) {
	f, err := sys.Open(path, func() (int, error) { return create(path) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := try(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func create(path string) (fd int, err error) {
	return unix.Open(path, unix.O_CREAT|unix.O_RDONLY|unix.O_CLOEXEC, 0o600)
}

// Wait takes the lock of an open file. It tries at least once, and then after each
// pause of the length poll. When ctx ends it returns [ErrLocked] with the file's name and
// ctx's cause.
func Wait(ctx context.Context, f *os.File, poll time.Duration) error {
	for {
		err := try(f)
		if !errors.Is(err, ErrLocked) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-time.After(poll):
		}
	}
}

// try takes the lock of an open file, or returns [ErrLocked] if it is held.
//
// "LOCK_EX: Place an exclusive lock. Only one process may hold an exclusive lock for
// a given file at a given time. [...] A call to flock() may block if an incompatible
// lock is held by another process. To make a nonblocking request, include LOCK_NB"
// flock(2). A call that blocks would not end with a context.
func try(f *os.File) error {
	err := sys.On(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: %s", ErrLocked, f.Name())
	}
	return explain(f, err)
}

// Unlock releases the lock and leaves f open. It releases it for all copies of the
// descriptor, those of a child before its execve included, which Close does not.
//
// "LOCK_UN: Remove an existing lock held by this process." flock(2)
func Unlock(f *os.File) error {
	return explain(f, sys.On(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_UN) }))
}

func explain(f *os.File, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
}
