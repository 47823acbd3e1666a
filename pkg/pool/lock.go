// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/flock"
)

// ErrLocked means that somebody else holds the lock and did not release it in time.
var ErrLocked = flock.ErrLocked

const (
	// lockPoll is the pause between two attempts to take a lockfile's lock. Its holder
	// usually needs seconds (a VM), so 50 ms more are not noticed, and 20 attempts a second
	// cost nothing.
	lockPoll = 50 * time.Millisecond

	// imagePoll is the same for the lock of an image. Its holder makes a clone, which
	// takes milliseconds.
	imagePoll = 2 * time.Millisecond
)

// Lock is a held lock of a lockfile. The kernel releases it when the process ends.
type Lock struct{ f *os.File }

// Unlock releases the lock.
func (l *Lock) Unlock() error { return errors.Join(flock.Unlock(l.f), l.f.Close()) }

func (p *Pool) lockfile(name string) string { return filepath.Join(p.root, locksDir, name+".lock") }

// Lock takes the exclusive lock of the given name, and waits for it until ctx ends.
// Then it returns [ErrLocked] with the lockfile and the processes that hold it.
func (p *Pool) Lock(ctx context.Context, name string) (*Lock, error) {
	path := p.lockfile(name)
	start := time.Now()
	f, err := flock.Lock(ctx, path, lockPoll)
	if err == nil {
		return &Lock{f}, nil
	}
	if ctx.Err() == nil {
		return nil, unlockable(path, err)
	}
	return nil, fmt.Errorf("%w: %s, after waiting %s, by %s; end that process if it hangs, and leave the file in place: deleting it would split the lock in two (%w)",
		ErrLocked, path, time.Since(start).Round(time.Millisecond), flock.Holders(path), context.Cause(ctx))
}

// TryLock takes the lock if nobody holds it. If somebody does, it returns nil and
// no error.
func (p *Pool) TryLock(name string) (*Lock, error) {
	path := p.lockfile(name)
	f, err := flock.TryLock(path)
	if errors.Is(err, ErrLocked) {
		return nil, nil
	}
	if err != nil {
		return nil, unlockable(path, err)
	}
	return &Lock{f}, nil
}

// unlockable says what to do about a lockfile that cannot be opened.
func unlockable(path string, err error) error {
	if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("%w: lock: %w; find out why root may not write there (lsattr -d %s)", ErrUnusable, err, filepath.Dir(path))
	}
	return Full(fmt.Errorf("lock: %w", err))
}

// LockHolders describes the processes that hold the lock of the given name, for a message.
func (p *Pool) LockHolders(name string) string { return flock.Holders(p.lockfile(name)) }

// LockHolder describes the process that holds the lock of the given name, for a message, or
// returns "" if nobody does. It makes no lockfile.
func (p *Pool) LockHolder(name string) (string, error) {
	f, err := os.Open(p.lockfile(name))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // one attempt
	if err := flock.Wait(ctx, f, lockPoll); errors.Is(err, ErrLocked) {
		return flock.Holders(f.Name()), nil
	} else if err != nil {
		return "", err
	}
	return "", nil // closing f releases the lock
}

// ErrOwned means that another plugin works on the pool.
var ErrOwned = errors.New("another plugin works on this pool")

const (
	ownerLock = "plugin"

	// ownPatience is how long Own waits for a plugin that was just killed. Its parent
	// learns of its end before the kernel closes its descriptors, and a program that it
	// was about to start has copies of them until its execve.
	ownPatience = 2 * time.Second
)

// Own makes this process the only plugin of the pool, until the lock is released or the
// process ends. What the pool holds half-made at that moment was left by a process that
// is gone. If another plugin has the pool, Own returns [ErrOwned].
func (p *Pool) Own(ctx context.Context) (*Lock, error) {
	waiting, cancel := context.WithTimeout(ctx, ownPatience)
	defer cancel()
	lock, err := p.Lock(waiting, ownerLock)
	if errors.Is(err, ErrLocked) && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %s is held by %s; stop that one, or give this one a --pool of its own", ErrOwned, p.root, p.LockHolders(ownerLock))
	}
	return lock, err
}

// OwnerLock is the end of the path of the file that the plugin of a pool holds locked, and open.
const OwnerLock = "/" + locksDir + "/" + ownerLock + ".lock"

// Touch records a time of use in the lockfile's modification time. It returns
// [os.ErrNotExist] if the lock of that name was never taken, as there is no file then.
func (p *Pool) Touch(name string, at time.Time) error {
	return os.Chtimes(p.lockfile(name), time.Time{}, at)
}

// Touched returns the time of the last [Pool.Touch], or else when the lockfile was made.
func (p *Pool) Touched(name string) (time.Time, error) {
	fi, err := os.Stat(p.lockfile(name))
	if err != nil {
		return time.Time{}, err
	}
	return fi.ModTime(), nil
}

// Note keeps v in an attribute of the lockfile of that name, as JSON, or removes what was kept if v is
// nil. It returns [os.ErrNotExist] if the lock was never taken.
func (p *Pool) Note(name string, attr Attr, v any) error {
	f, err := os.Open(p.lockfile(name))
	if err != nil {
		return err
	}
	defer f.Close()
	if v == nil {
		return RemoveRecord(f, p.noteAttr(attr))
	}
	return SetRecord(f, p.noteAttr(attr), v)
}

// Noted reads what [Pool.Note] kept into v. If that is nothing, it returns [ErrNoRecord].
func (p *Pool) Noted(name string, attr Attr, v any) error {
	f, err := os.Open(p.lockfile(name))
	if err != nil {
		return err
	}
	defer f.Close()
	return GetRecord(f, p.noteAttr(attr), v)
}

// LockImage takes the exclusive lock of an open image, and waits until ctx ends for
// others that opened the image themselves. Then it returns [ErrLocked]. Closing f
// releases the lock too.
func LockImage(ctx context.Context, f *os.File) (unlock func() error, err error) {
	if err := flock.Wait(ctx, f, imagePoll); err != nil {
		return nil, err
	}
	return func() error { return flock.Unlock(f) }, nil
}
