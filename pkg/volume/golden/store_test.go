// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package golden

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// made makes a generation of a golden with some content.
func made(t *testing.T, s *Store, n Name) Generation {
	t.Helper()
	f, err := s.New()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	g, err := s.Publish(f, Record{Namespace: n.Namespace, Name: n.Name})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// newGoldens returns a store of an empty pool.
func newGoldens(t *testing.T) *Store {
	t.Helper()
	p, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(testenv.XFS.Pool(t), "pool")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return NewStore(p)
}

// TestNobodyWrites: whoever has opened a generation cannot write to it by mistake.
func TestNobodyWrites(t *testing.T) {
	s := newGoldens(t)
	g, err := s.Open(made(t, s, Name{"ci", "a"}))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if _, err := g.File.WriteAt([]byte("other"), 0); !errors.Is(err, syscall.EBADF) {
		t.Errorf("writing to a generation: %v", err)
	}
}

// TestUseIsNotedSeldom checks when a use of a generation is noted on disk.
func TestUseIsNotedSeldom(t *testing.T) {
	s := newGoldens(t)
	start := time.Now().Add(-time.Second) // the kernel's time stamps lag behind time.Now
	old := start.Add(-48 * time.Hour).Truncate(time.Second)
	a, b := made(t, s, Name{"ci", "a"}), made(t, s, Name{"ci", "b"})
	age := func(g Generation) {
		t.Helper()
		if err := os.Chtimes(s.Path(g), old, old); err != nil {
			t.Fatal(err)
		}
	}
	noted := func(g Generation, want bool) {
		t.Helper()
		h, err := s.Look(g)
		if err != nil || h.Used.Equal(old) == want || want && h.Used.Before(start) {
			t.Errorf("%s was last used at %s, and a use just now is to be noted: %t; %v", g, h.Used, want, err)
		}
	}
	for _, g := range []Generation{a, b} {
		age(g)
		s.Touch(g)
		noted(g, true)
	}
	age(a)
	s.Touch(a)
	noted(a, false)
	for g := range s.used {
		s.used[g] = s.used[g].Add(-touchEvery)
	}
	s.Touch(a)
	noted(a, true)
	if len(s.used) != 1 {
		t.Errorf("what was not used for long is remembered: %v", s.used)
	}
	age(a)
	NewStore(s.pool).Touch(a) // another process
	noted(a, true)
}
