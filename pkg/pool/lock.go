// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
)

// ErrLocked means that another process holds the lock and did not let go in time.
var ErrLocked = errors.New("lock is held")

// lockPoll is how often a held lock is tried again. What is waited for takes
// seconds (a VM), so a twentieth of one is not felt, and costs nothing.
const lockPoll = 50 * time.Millisecond

// Lock is a held flock(2). The kernel releases it with the process, however
// that ends, so it is proof of life as no pid is.
type Lock struct{ f *flock.Flock }

// Lock takes the exclusive lock of the given name, waiting until ctx ends. The
// error then is [ErrLocked] and names the lockfile and who holds it.
//
// A lockfile is never deleted: a process that waits on a deleted one would
// share its lock with nobody.
func (p *Pool) Lock(ctx context.Context, name string) (*Lock, error) {
	path := filepath.Join(p.root, locksDir, name+".lock")
	f := flock.New(path, flock.SetPermissions(0o600))
	if err := failpoint.Before("flock"); err != nil { // it may make the file
		return nil, full(&os.PathError{Op: "flock", Path: path, Err: err})
	}
	start := time.Now()
	ok, err := f.TryLockContext(ctx, lockPoll)
	if ok {
		return &Lock{f}, nil
	}
	if ctx.Err() == nil {
		return nil, unlockable(path, err)
	}
	return nil, fmt.Errorf("%w: %s, after waiting %s, by %s; end that process if it hangs, and leave the file in place: deleting it would split the lock in two (%w)",
		ErrLocked, path, time.Since(start).Round(time.Millisecond), holders(path), context.Cause(ctx))
}

// TryLock takes the lock if nobody holds it; else it returns nil and no error.
func (p *Pool) TryLock(name string) (*Lock, error) {
	path := filepath.Join(p.root, locksDir, name+".lock")
	f := flock.New(path, flock.SetPermissions(0o600))
	ok, err := f.TryLock()
	if err != nil {
		return nil, unlockable(path, err)
	}
	if !ok {
		return nil, nil
	}
	return &Lock{f}, nil
}

// ErrOwned means that another plugin works on the pool.
var ErrOwned = errors.New("another plugin works on this pool")

const (
	ownerLock = "plugin"

	// ownPatience is for a process that was just killed: the kernel takes its
	// descriptors away after its parent was told of its end, and a process that it was
	// about to start has copies of them until then.
	ownPatience = 2 * time.Second
)

// Own makes this process the one plugin of the pool, until the lock is released or
// the process ends, however it does. What the pool holds half-made is dead then. While
// another has it the error is [ErrOwned].
func (p *Pool) Own(ctx context.Context) (*Lock, error) {
	waiting, cancel := context.WithTimeout(ctx, ownPatience)
	defer cancel()
	lock, err := p.Lock(waiting, ownerLock)
	if errors.Is(err, ErrLocked) && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %s is held by %s; stop that one, or give this one a --pool of its own", ErrOwned, p.root, p.LockHolders(ownerLock))
	}
	return lock, err
}

// unlockable says what to do about a lockfile that cannot be opened.
func unlockable(path string, err error) error {
	if errors.Is(err, os.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: lock: %w; see why root may not write there (lsattr -d %s)", ErrUnusable, err, filepath.Dir(path))
	}
	return full(fmt.Errorf("lock %s: %w", path, err))
}

// Unlock releases the lock.
func (l *Lock) Unlock() error { return l.f.Close() }

// Touch notes, in the lockfile's modification time, that what the lock of the given
// name guards was used at that moment. There is nothing to note it in where nobody
// ever took the lock: that is [os.ErrNotExist].
func (p *Pool) Touch(name string, at time.Time) error {
	return os.Chtimes(filepath.Join(p.root, locksDir, name+".lock"), time.Time{}, at)
}

// Touched is what [Pool.Touch] noted last, or when the lockfile was made.
func (p *Pool) Touched(name string) (time.Time, error) {
	fi, err := os.Stat(filepath.Join(p.root, locksDir, name+".lock"))
	if err != nil {
		return time.Time{}, err
	}
	return fi.ModTime(), nil
}

// LockImage takes the exclusive flock(2) of an open image, waiting until ctx ends for
// others that opened it for themselves; then it is [ErrLocked]. It goes with f, or
// with unlock.
func LockImage(ctx context.Context, f *os.File) (unlock func() error, err error) {
	flock := func(how int) error {
		for {
			if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
				return err
			}
		}
	}
	for {
		err := flock(unix.LOCK_EX | unix.LOCK_NB)
		if err == nil {
			return func() error { return flock(unix.LOCK_UN) }, nil
		}
		if err != unix.EWOULDBLOCK {
			return nil, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s: %w", ErrLocked, f.Name(), context.Cause(ctx))
		case <-time.After(imagePoll):
		}
	}
}

// imagePoll is how often a held image is tried again: what is waited for, a clone,
// takes milliseconds.
const imagePoll = 2 * time.Millisecond

// LockHolders describes who holds the lock of the given name, for a message.
func (p *Pool) LockHolders(name string) string {
	return holders(filepath.Join(p.root, locksDir, name+".lock"))
}

// holders describes the processes that hold a flock on path, as far as
// /proc/locks and /proc/<pid> show them: "pid=7 cmd=…".
func holders(path string) string {
	const unknown = "a process that /proc does not show here (in another PID namespace?)"
	fi, err := os.Stat(path)
	if err != nil {
		return unknown
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return unknown
	}
	var found []string
	for _, pid := range flockHolders(string(locks), fi.Sys().(*syscall.Stat_t).Ino) {
		if !hasOpen(pid, fi) {
			continue
		}
		cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		cmd = bytes.ReplaceAll(bytes.TrimRight(cmd, "\x00"), []byte{0}, []byte{' '})
		found = append(found, fmt.Sprintf("pid=%d cmd=%s", pid, cmd))
	}
	if len(found) == 0 {
		return unknown
	}
	return strings.Join(found, ", ")
}

// flockHolders parses proc_locks(5):
//
//	1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
//
// A waiter's line has "->" after the number. The device is not compared: for
// btrfs it is not the one that stat(2) shows.
func flockHolders(locks string, inode uint64) []int {
	var pids []int
	for line := range strings.Lines(locks) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(inode, 10)) {
			continue
		}
		if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// hasOpen reports whether a process has the file open.
func hasOpen(pid int, file os.FileInfo) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if fi, err := os.Stat(fd); err == nil && os.SameFile(fi, file) {
			return true
		}
	}
	return false
}
