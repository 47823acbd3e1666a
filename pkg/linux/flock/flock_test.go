// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package flock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// poll is short: the tests wait for it.
const poll = time.Millisecond

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := Lock(t.Context(), path, poll)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := first.Stat(); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the lockfile has mode %v: %v", fi.Mode(), err)
	}
	if _, err := TryLock(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Errorf("TryLock of a held lock: %v", err)
	}
	if want := fmt.Sprintf("pid=%d cmd=", os.Getpid()); !strings.Contains(Holders(path), want) {
		t.Errorf("the holders are %q, without %q", Holders(path), want)
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, enough)
	defer cancel()
	for _, when := range []string{"that ends", "that has ended"} {
		if _, err := Lock(ctx, path, poll); !errors.Is(err, enough) || !strings.Contains(err.Error(), path) || errors.Is(err, ErrLocked) != (when == "that ends") {
			t.Errorf("Lock of a held lock with a context %s: %v", when, err)
		}
	}
	time.AfterFunc(20*time.Millisecond, func() { errors.Join(Unlock(first), first.Close()) })
	second, err := Lock(t.Context(), path, poll)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	third, err := TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	third.Close()
}

// TestEndedContextMakesNoFile: a caller that gave up leaves nothing behind.
func TestEndedContextMakesNoFile(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path := filepath.Join(t.TempDir(), "lock")
	if _, err := Lock(ctx, path, poll); !errors.Is(err, context.Canceled) {
		t.Errorf("Lock: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lockfile exists: %v", err)
	}
}

func TestLockfileThatCannotBeMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing", "lock")
	_, locked := Lock(t.Context(), path, poll)
	_, tried := TryLock(path)
	for call, err := range map[string]error{"Lock": locked, "TryLock": tried} {
		if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", call, err)
		}
	}
}

// TestWait takes the lock of one file through two descriptors of its own.
func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	var files [2]*os.File
	for i := range files {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files[i] = f
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Wait(ctx, files[0], poll); err != nil {
		t.Errorf("a free lock, and a context that has ended: %v", err)
	}
	if err := Wait(ctx, files[1], poll); !errors.Is(err, ErrLocked) || !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), path) {
		t.Errorf("a held lock, and a context that has ended: %v", err)
	}
	if err := errors.Join(Unlock(files[0]), Wait(t.Context(), files[1], poll)); err != nil {
		t.Error(err)
	}
}

// TestUnlockReleasesAllCopies: a child has a copy of the descriptor until its
// execve, and must not keep the lock held.
func TestUnlockReleasesAllCopies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	childs := os.NewFile(uintptr(fd), path)
	defer childs.Close()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(path); !errors.Is(err, ErrLocked) {
		t.Errorf("after Close, while there is a copy: %v", err)
	}
	if err := Unlock(childs); err != nil {
		t.Fatal(err)
	}
	again, err := TryLock(path)
	if err != nil {
		t.Fatalf("after Unlock, while there is a copy: %v", err)
	}
	again.Close()
}

func TestFlockHolders(t *testing.T) {
	const locks = `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF
1: -> FLOCK  ADVISORY  WRITE 1235 08:01:5678 0 EOF
2: POSIX  ADVISORY  WRITE 99 08:01:5678 0 EOF
3: FLOCK  ADVISORY  WRITE 100 08:01:15678 0 EOF
4: FLOCK  ADVISORY  WRITE 0 08:01:5678 0 EOF
5: FLOCK  ADVISORY  READ  7 00:2a:5678 0 EOF
garbage
`
	if got := flockHolders(locks, 5678); !slices.Equal(got, []int{1234, 7}) {
		t.Errorf("got the holders %v, want 1234 and 7", got)
	}
}
