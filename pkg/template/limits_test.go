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

// sized returns the spec of a template of mib MiB.
func sized(mib int64) diskfs.Spec { return diskfs.Spec{Filesystem: "ext4", Size: mib << 20} }

func keyOf(mib int64) string { return Key(sized(mib), fp) }

// have builds templates and closes them. They were last used in this order, an hour apart, in the
// past. It returns the space that they take.
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
	if removed, err := s.trim(budget, ""); removed != want || err != nil {
		t.Errorf("%d templates were removed, want %d: %v", removed, want, err)
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
			// A volume of the template that goes first, and a file that is no template.
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

			// A template that somebody builds or replaces stays, and so does one that is open here.
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
			open.Close() // a second Close does not let go again
			trim(t, s, 0, 1)
			if err := held.Unlock(); err != nil {
				t.Error(err)
			}
			trim(t, s, 0, 1)
			onlyTemplates(t, p, "notes.txt")
			if want := []string{keyOf(61) + "true", keyOf(64) + "true", keyOf(63) + "true", keyOf(62) + "true"}; strings.Join(trimmed, " ") != strings.Join(want, " ") {
				t.Errorf("Trimmed was called for %q, want %q", trimmed, want)
			}
			if len(s.touched)+len(s.verified)+len(s.holders) > 0 {
				t.Errorf("the store remembers %v, %v and %v of templates that are gone", s.touched, s.verified, s.holders)
			}
		})
	}
}

// TestTrimAfterBuild has room for two of three templates.
func TestTrimAfterBuild(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			var budget int64
			s := newStore(t, p, func(c *Config) { c.Budget = func() (int64, error) { return budget, nil } })
			budget = 1 << 40
			budget = have(t, s, 61, 62)
			third := sized(60) // no larger than either of the others
			tmpl, err := s.Ensure(t.Context(), third)
			if err != nil || tmpl.Hit {
				t.Fatalf("Ensure returned %v, %v, want a new template", tmpl, err)
			}
			onlyTemplates(t, p, keyOf(60), keyOf(62))
			tmpl.Close()
			// The budget has room for nothing. The template that was just built stays all the same.
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

// TestTrimWhatIsWaitedFor trims everything while callers wait for builds. None of them may find
// its template gone.
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
				<-proceed // all callers have a template at the same time
				err = tmpl.Close()
			}
			results <- err
		}()
	}
	testenv.Eventually(t, "all templates", func() bool {
		if removed, err := s.trim(0, ""); removed > 0 || err != nil {
			t.Errorf("%d templates were removed, want 0: %v", removed, err)
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
		t.Errorf("%d templates of %d kinds were built", builds.Load(), kinds)
	}
	trim(t, s, 0, kinds)
}

// TestTouch checks when a hit notes the template's use.
func TestTouch(t *testing.T) {
	p := newPool(t, testenv.XFS)
	s := newStore(t, p, nil)
	start := time.Now().Add(-time.Second) // the kernel's time stamps lag behind time.Now
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
		t.Errorf("the template was just built, and last used at %s", at)
	}
	old := start.Add(-48 * time.Hour).Truncate(time.Second)
	if err := p.Touch(key, old); err != nil {
		t.Fatal(err)
	}
	ensure(t, s, true)
	if at := touched(); !at.Equal(old) {
		t.Errorf("a second use within the hour was noted, at %s", at)
	}
	s.touched[key] = s.touched[key].Add(-touchEvery)
	ensure(t, s, true)
	if at := touched(); at.Before(start) {
		t.Errorf("a use after an hour was not noted, the last is at %s", at)
	}
	if err := p.Touch(key, old); err != nil {
		t.Fatal(err)
	}
	other := newStore(t, p, nil)
	ensure(t, other, true) // another process
	if at := touched(); at.Before(start) {
		t.Errorf("a use by another process was not noted, the last is at %s", at)
	}
	// A template that is built again long after it was removed counts as new.
	if err := errors.Join(p.Touch(key, old), os.Remove(p.Template(key))); err != nil {
		t.Fatal(err)
	}
	ensure(t, newStore(t, p, nil), false)
	if at := touched(); at.Before(start) {
		t.Errorf("the template was built again, and last used at %s", at)
	}
	// A hit does not need the lockfile.
	if err := os.Remove(filepath.Join(p.Root(), "locks", key+".lock")); err != nil {
		t.Fatal(err)
	}
	ensure(t, newStore(t, p, nil), true)
}

// TestBuildsPerHour checks that everything that starts a VM counts, and nothing else.
func TestBuildsPerHour(t *testing.T) {
	p := newPool(t, testenv.XFS)
	now := time.Now()
	boom := errors.New("boom")
	var fail, observed error
	s := newStore(t, p, func(c *Config) {
		c.BuildsPerHour = 2
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			if fail != nil {
				return Provenance{}, fail
			}
			return mkfs(ctx, f, spec)
		}
		c.Observe = func(_ diskfs.Spec, _ time.Duration, err error) { observed = err }
	})
	s.pace.now = func() time.Time { return now }
	want := func(mib int64, want error) {
		t.Helper()
		tmpl, err := s.Ensure(t.Context(), sized(mib))
		if !errors.Is(err, want) {
			t.Errorf("%d MiB: %v, want %v", mib, err, want)
		}
		if err == nil {
			tmpl.Close()
		}
	}
	fail = NoFormatter(errors.New("no qemu"))
	for range 5 {
		want(61, ErrNoFormatter)
	}
	fail = boom
	want(61, boom) // a VM was started
	fail = nil
	want(61, nil)
	want(61, nil) // a hit
	want(62, ErrTooMany)
	if !errors.Is(observed, ErrTooMany) {
		t.Errorf("the refused build is observed as %v", observed)
	}
	want(61, nil)
	if _, err := os.Lstat(filepath.Join(p.Root(), "locks", keyOf(62)+".lock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the refused build left its lockfile: %v", err)
	}
	onlyTemplates(t, p, keyOf(61))
	now = now.Add(time.Hour)
	want(62, nil)

	// A call that joins a build does not count, nor does one that finds it done by another process.
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
		return s.pace.bucket.TokensAt(now) < 1
	})
	want(65, ErrTooMany)
	// The other process finishes its build.
	if err := s.create(keyOf(64), sized(64), time.Now(), &turn{}); err != nil {
		t.Error(err)
	}
	held.Unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
	want(65, nil)
	want(66, ErrTooMany)
}
