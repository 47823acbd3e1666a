// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// sized is the spec of a template of so many MiB.
func sized(mib int64) diskfs.Spec { return diskfs.Spec{Filesystem: "ext4", Size: mib << 20} }

func keyOf(mib int64) string { return Key(sized(mib), fp) }

// TestBuildsPerHour counts what would start a VM, and only that.
func TestBuildsPerHour(t *testing.T) {
	p := newPool(t, testenv.XFS)
	now := time.Now()
	boom := errors.New("boom")
	var fail error
	s := newStore(t, p, func(c *Config) {
		c.BuildsPerHour = 2
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			if fail != nil {
				return Provenance{}, fail
			}
			return mkfs(ctx, f, spec)
		}
	})
	s.rate.now = func() time.Time { return now }
	want := func(mib int64, want error) {
		t.Helper()
		tmpl, err := s.Ensure(t.Context(), sized(mib))
		if !errors.Is(err, want) {
			t.Errorf("%d MiB: %v, not %v", mib, err, want)
		}
		if err == nil {
			tmpl.Close()
		}
	}
	fail = fmt.Errorf("%w: no qemu", ErrNoFormatter)
	for range 5 {
		want(61, ErrNoFormatter)
	}
	fail = boom
	want(61, boom) // ran
	fail = nil
	want(61, nil)
	want(61, nil) // a hit
	want(62, ErrTooMany)
	want(61, nil)
	if _, err := os.Lstat(filepath.Join(p.Root(), "locks", keyOf(62)+".lock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was refused left its lockfile: %v", err)
	}
	onlyTemplates(t, p, keyOf(61))
	now = now.Add(time.Hour)
	want(62, nil)

	// Who joins a build is not counted, nor is who finds it done by another process.
	now = now.Add(time.Hour)
	done := make(chan error)
	for range 10 {
		go func() {
			tmpl, err := s.Ensure(t.Context(), sized(63))
			if err == nil {
				err = tmpl.Close()
			}
			done <- err
		}()
	}
	for range 10 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	held, err := p.Lock(t.Context(), keyOf(64))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		tmpl, err := s.Ensure(t.Context(), sized(64))
		if err == nil {
			err = tmpl.Close()
		}
		done <- err
	}()
	testenv.Eventually(t, "the turn to be taken", func() bool {
		s.rate.mu.Lock()
		defer s.rate.mu.Unlock()
		return len(s.rate.begun) == 2
	})
	want(65, ErrTooMany)
	// The other process is done.
	if err := s.format(keyOf(64), sized(64), time.Now(), &turn{}); err != nil {
		t.Error(err)
	}
	held.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
	want(65, nil)
	want(66, ErrTooMany)
}
