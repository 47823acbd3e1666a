// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

func prewarm(t *testing.T, s *Store, mib int64, want error) {
	t.Helper()
	if err := s.Prewarm(t.Context(), sized(mib), time.Time{}); !errors.Is(err, want) {
		t.Errorf("%d MiB: %v, want %v", mib, err, want)
	}
}

// TestPrewarm builds templates ahead, beside a budget of builds that is used up.
func TestPrewarm(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			var builds atomic.Int32
			var fail error
			s := newStore(t, p, func(c *Config) {
				c.BuildsPerHour = 1
				c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
					builds.Add(1)
					if fail != nil {
						return Provenance{}, fail
					}
					return mkfs(ctx, f, spec)
				}
			})
			for _, mib := range []int64{61, 62, 61, 63} {
				prewarm(t, s, mib, nil)
			}
			if builds.Load() != 3 || !s.Has(sized(62)) || s.Has(sized(64)) {
				t.Errorf("%d builds, of three sizes", builds.Load())
			}
			if tmpl, err := s.Ensure(t.Context(), sized(62)); err != nil || !tmpl.Hit {
				t.Errorf("the template is not there for a caller: %v", err)
			} else {
				tmpl.Close()
			}
			// The one build of callers is still theirs.
			if tmpl, err := s.Ensure(t.Context(), sized(65)); err != nil {
				t.Error(err)
			} else {
				tmpl.Close()
			}
			prewarm(t, s, 66, nil)
			onlyTemplates(t, p, keyOf(61), keyOf(62), keyOf(63), keyOf(65), keyOf(66))

			fail = errors.New("boom")
			prewarm(t, s, 67, fail)
			fail = NoFormatter(errors.New("no qemu"))
			prewarm(t, s, 67, ErrNoFormatter)
			raw := diskfs.Spec{Filesystem: "raw", Size: 1 << 20}
			if err := s.Prewarm(t.Context(), raw, time.Time{}); !errors.Is(err, diskfs.ErrInvalid) {
				t.Errorf("raw: %v", err)
			}
			prewarm(t, s, 1, diskfs.ErrOutOfRange)
		})
	}
}

// TestPrewarmComesLast has a caller whose build is under way, and one who asks while a template is built ahead.
func TestPrewarmComesLast(t *testing.T) {
	p := newPool(t, testenv.XFS)
	started, proceed := make(chan int64), make(chan bool)
	done := make(chan error, 10) // nobody may wait for them after a failure
	s := newStore(t, p, func(c *Config) {
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			select {
			case started <- spec.Size >> 20:
				<-proceed
				return mkfs(ctx, f, spec)
			case <-ctx.Done():
				return Provenance{}, ctx.Err()
			}
		}
	})
	ask := func(mib int64) {
		go func() {
			tmpl, err := s.Ensure(context.Background(), sized(mib))
			if err == nil {
				err = tmpl.Close()
			}
			done <- err
		}()
	}
	ahead := func(ctx context.Context, mib int64) {
		go func() { done <- s.Prewarm(ctx, sized(mib), time.Time{}) }()
	}
	next := func(want int64) {
		t.Helper()
		if got := <-started; got != want {
			t.Errorf("the build of %d MiB began, want %d", got, want)
		}
	}
	none := func() {
		t.Helper()
		select {
		case got := <-started:
			close(proceed)
			t.Fatalf("the build of %d MiB began beside that of a caller", got)
		case <-time.After(3 * idlePoll):
		}
	}
	end := func(n int) {
		t.Helper()
		for range n {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	ask(61)
	next(61)
	ahead(t.Context(), 62)
	none()
	ask(63) // asks later, and is built before
	next(63)
	none()
	proceed <- true
	proceed <- true
	end(2)
	next(62)
	ask(62) // joins
	ask(64) // has a slot of its own
	next(64)
	proceed <- true
	proceed <- true
	end(3)

	// Who waits to build ahead goes away with its context.
	ask(65)
	next(65)
	ctx, cancel := context.WithCancel(t.Context())
	ahead(ctx, 66)
	none()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want one that was canceled", err)
	}
	proceed <- true
	end(1)
	onlyTemplates(t, p, keyOf(61), keyOf(62), keyOf(63), keyOf(64), keyOf(65))
}

// TestRetain has a budget for two templates.
func TestRetain(t *testing.T) {
	p := newPool(t, testenv.XFS)
	budget := int64(1 << 40)
	s := newStore(t, p, func(c *Config) { c.Budget = func() (int64, error) { return budget, nil } })
	budget = have(t, s, 64, 63)
	s.Retain([]diskfs.Spec{sized(64), {Filesystem: "xfs", Size: 1 << 30}}) // the least recently used
	prewarm(t, s, 60, nil)
	onlyTemplates(t, p, keyOf(60), keyOf(64))
	s.Retain([]diskfs.Spec{sized(60), sized(64), sized(62)})
	budget = takes(t, p, keyOf(60)) + takes(t, p, keyOf(64))
	err := s.Prewarm(t.Context(), sized(62), time.Time{})
	if !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "--template-cache") {
		t.Errorf("%v, want %v", err, ErrNoRoom)
	}
	onlyTemplates(t, p, keyOf(60), keyOf(64))
	s.Retain(nil)
	prewarm(t, s, 62, nil)
	onlyTemplates(t, p, keyOf(60), keyOf(62)) // of 64 MiB was used least recently
}

// TestOutdated changes the formatter. The templates that were used last are told first, and have the same last use
// when they are built anew.
func TestOutdated(t *testing.T) {
	p := newPool(t, testenv.XFS)
	now := fp
	c := func(c *Config) {
		c.Fingerprint = func(diskfs.Spec) (string, error) { return now, nil }
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			made, err := mkfs(ctx, f, spec)
			made.Fingerprint = now
			return made, err
		}
	}
	s := newStore(t, p, c)
	have(t, s, 61, 62, 63)
	week := time.Now().Add(-7 * 24 * time.Hour)
	outdated := func() []Outdated {
		t.Helper()
		all, err := s.Outdated(week)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	if all := outdated(); len(all) != 0 {
		t.Errorf("nothing has changed, but %+v is outdated", all)
	}
	now = "fedcba9876543210"
	if err := errors.Join(
		p.Touch(Key(sized(61), fp), week.Add(-time.Hour)),                   // too long ago
		os.WriteFile(p.Template("ext4-65m-"+fp), make([]byte, 4096), 0o400), // no template
		os.WriteFile(p.Template("notes.txt"), nil, 0o400),
	); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, p, c) // another process
	all := outdated()
	if len(all) != 2 || !all[0].Spec.Equal(sized(63)) || !all[1].Spec.Equal(sized(62)) || !all[0].Used.After(all[1].Used) {
		t.Fatalf("outdated are %+v, want 63 and 62 MiB", all)
	}
	if err := s.Prewarm(t.Context(), all[0].Spec, all[0].Used); err != nil {
		t.Fatal(err)
	}
	key := Key(sized(63), now)
	if used := s.lastUse(key); !used.Equal(all[0].Used) {
		t.Errorf("the new template was used last at %s, want %s", used, all[0].Used)
	}
	if rest := outdated(); len(rest) != 1 || !rest[0].Spec.Equal(sized(62)) {
		t.Errorf("outdated are %+v, want 62 MiB", rest)
	}
	tmpl, err := s.Ensure(t.Context(), sized(63))
	if err != nil || !tmpl.Hit {
		t.Fatalf("%v, want the new template", err)
	}
	tmpl.Close()
	if used := s.lastUse(key); time.Since(used) > time.Minute {
		t.Errorf("the first use of the new template was not noted, but at %s", used)
	}
	half := takes(t, p, Key(sized(62), fp))
	s.cfg.Budget = func() (int64, error) { return 2 * half, nil }
	if all := outdated(); len(all) != 1 {
		t.Errorf("there is room, and outdated are %+v", all)
	}
	half--
	if all := outdated(); len(all) != 0 {
		t.Errorf("there is no room, and outdated are %+v", all)
	}
}
