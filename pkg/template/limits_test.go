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
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// sized is the spec of a template of so many MiB.
func sized(mib int64) diskfs.Spec { return diskfs.Spec{Filesystem: "ext4", Size: mib << 20} }

func keyOf(mib int64) string { return Key(sized(mib), fp) }

// have makes templates that are there, used in this order, an hour apart, and in the
// past, and that nobody has open. It returns what they take.
func have(t *testing.T, s *Store, sizes ...int64) (bytes int64) {
	t.Helper()
	for i, size := range sizes {
		tmpl, err := s.Ensure(t.Context(), sized(size))
		if err != nil {
			t.Fatal(err)
		}
		tmpl.Close()
		used := time.Now().Add(time.Duration(i-len(sizes)-1) * time.Hour).Truncate(time.Second)
		if err := s.cfg.Pool.Touch(tmpl.Key, used); err != nil {
			t.Fatal(err)
		}
		bytes += takes(t, s.cfg.Pool, tmpl.Key)
	}
	return bytes
}

func takes(t *testing.T, p *pool.Pool, key string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Lstat(p.Template(key), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func trim(t *testing.T, s *Store, budget int64, want int) {
	t.Helper()
	if removed, err := s.Trim(budget); removed != want || err != nil {
		t.Errorf("%d removed, not %d: %v", removed, want, err)
	}
}

func TestTrim(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			var trimmed []string
			s := newStore(t, p, func(c *Config) {
				c.Trimmed = func(key string, bytes int64) { trimmed = append(trimmed, fmt.Sprint(key, bytes > 0)) }
			})
			sum := have(t, s, 61, 62, 63, 64)
			// A volume of what goes first, and a file that is nobody's.
			src, err := s.Lookup(keyOf(61))
			if err != nil {
				t.Fatal(err)
			}
			clone, err := p.NewVolume()
			if err != nil {
				t.Fatal(err)
			}
			defer clone.Close()
			if err := errors.Join(reflink.Clone(clone, src.File), src.Close(), os.WriteFile(p.Template("notes.txt"), make([]byte, 1<<20), 0o600)); err != nil {
				t.Fatal(err)
			}
			trim(t, s, sum, 0)
			trim(t, s, sum-1, 1)
			onlyTemplates(t, p, keyOf(62), keyOf(63), keyOf(64), "notes.txt")
			if sum, err := digest(clone); err != nil || sum != src.Digest {
				t.Errorf("the volume has the digest %s, its template had %s: %v", sum, src.Digest, err)
			}

			// What is built or replaced by somebody stays, and what is open here.
			held, err := p.Lock(t.Context(), keyOf(62))
			if err != nil {
				t.Fatal(err)
			}
			open, err := s.Ensure(t.Context(), sized(63))
			if err != nil {
				t.Fatal(err)
			}
			trim(t, s, 0, 1)
			onlyTemplates(t, p, keyOf(62), keyOf(63), "notes.txt")
			trim(t, s, 0, 0)
			if err := open.Close(); err != nil {
				t.Error(err)
			}
			open.Close() // lets go of it once
			trim(t, s, 0, 1)
			if err := held.Unlock(); err != nil {
				t.Error(err)
			}
			trim(t, s, 0, 1)
			onlyTemplates(t, p, "notes.txt")
			if want := []string{keyOf(61) + "true", keyOf(64) + "true", keyOf(63) + "true", keyOf(62) + "true"}; strings.Join(trimmed, " ") != strings.Join(want, " ") {
				t.Errorf("told of %v, not %v", trimmed, want)
			}
			if len(s.touched)+len(s.verified)+len(s.holders) > 0 {
				t.Errorf("remembers %v, %v and %v", s.touched, s.verified, s.holders)
			}
		})
	}
}

// TestTrimAfterBuild has room for two templates, of three that take turns.
func TestTrimAfterBuild(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			var budget int64
			s := newStore(t, p, func(c *Config) { c.Budget = func() (int64, error) { return budget, nil } })
			budget = 1 << 40
			budget = have(t, s, 61, 62)
			third := sized(60) // is no larger than either
			tmpl, err := s.Ensure(t.Context(), third)
			if err != nil || tmpl.Hit {
				t.Fatalf("hit %v, %v", tmpl, err)
			}
			onlyTemplates(t, p, keyOf(60), keyOf(62))
			tmpl.Close()
			// Nothing but the latest fits, which stays, however small the budget.
			budget = 1
			last, err := s.Ensure(t.Context(), sized(64))
			if err != nil {
				t.Fatal(err)
			}
			defer last.Close()
			onlyTemplates(t, p, keyOf(64))
		})
	}
}

// TestTrimWhatIsWaitedFor trims all there is while callers wait for builds: none of
// them finds its template gone.
func TestTrimWhatIsWaitedFor(t *testing.T) {
	p := newPool(t, testenv.XFS)
	var builds, served atomic.Int32
	s := newStore(t, p, func(c *Config) {
		c.MaxBuilds = 4
		c.Budget = func() (int64, error) { return 0, nil }
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			builds.Add(1)
			return mkfs(ctx, f, spec)
		}
	})
	const callers, kinds = 32, 8
	results := make(chan error, callers)
	proceed := make(chan bool)
	for i := range int64(callers) {
		go func() {
			tmpl, err := s.Ensure(t.Context(), sized(60+i%kinds))
			served.Add(1)
			if err == nil {
				<-proceed // all have theirs at the same time
				err = tmpl.Close()
			}
			results <- err
		}()
	}
	testenv.Eventually(t, "all templates", func() bool {
		if removed, err := s.Trim(0); removed > 0 || err != nil {
			t.Errorf("%d removed: %v", removed, err)
		}
		return served.Load() == callers
	})
	close(proceed)
	for range callers {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if builds.Load() != kinds {
		t.Errorf("%d builds of %d kinds", builds.Load(), kinds)
	}
	trim(t, s, 0, kinds)
}

// TestTouch looks at when a hit notes itself.
func TestTouch(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, nil)
	start := time.Now().Add(-time.Second) // the kernel's clock lags
	key := ensure(t, s, false).Key
	touched := func() time.Time {
		t.Helper()
		at, err := p.Touched(key)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	if at := touched(); at.Before(start) {
		t.Errorf("built now, used at %s", at)
	}
	old := start.Add(-48 * time.Hour).Truncate(time.Second)
	if err := p.Touch(key, old); err != nil {
		t.Fatal(err)
	}
	ensure(t, s, true)
	if at := touched(); !at.Equal(old) {
		t.Errorf("a second use within the hour wrote %s", at)
	}
	s.touched[key] = s.touched[key].Add(-touchEvery)
	ensure(t, s, true)
	if at := touched(); at.Before(start) {
		t.Errorf("an hour later: %s", at)
	}
	if err := p.Touch(key, old); err != nil {
		t.Fatal(err)
	}
	other := newStore(t, p, nil)
	ensure(t, other, true) // another process
	if at := touched(); at.Before(start) {
		t.Errorf("another process wrote nothing: %s", at)
	}
	// A template that is found again long after it was removed is a new one.
	if err := errors.Join(p.Touch(key, old), os.Remove(p.Template(key))); err != nil {
		t.Fatal(err)
	}
	ensure(t, newStore(t, p, nil), false)
	if at := touched(); at.Before(start) {
		t.Errorf("built again, used at %s", at)
	}
	// It is no condition of a hit.
	if err := os.Remove(filepath.Join(p.Root(), "locks", key+".lock")); err != nil {
		t.Fatal(err)
	}
	ensure(t, newStore(t, p, nil), true)
}

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
