// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package warm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

// maker makes volumes whose images are empty files without a name.
type maker struct {
	t     *testing.T
	fail  atomic.Bool // nothing can be made
	short atomic.Bool // there is no room
	busy  atomic.Bool // somebody waits for the node

	mu   sync.Mutex
	made []*os.File
}

func (m *maker) make(context.Context, Kind, diskfs.Spec) (*Volume, error) {
	if m.fail.Load() {
		return nil, errors.New("cannot be made")
	}
	f, err := tmpfile.Create(m.t.TempDir(), 0o600)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.made = append(m.made, f)
	return &Volume{File: f, Made: time.Now()}, nil
}

func (m *maker) room() error {
	if m.short.Load() {
		return errors.New("short")
	}
	return nil
}

// open counts the volumes that were neither given away nor given back.
func (m *maker) open() (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.made {
		if _, err := f.Stat(); err == nil {
			n++
		}
	}
	return n
}

// newStock starts a Stock.
func (m *maker) newStock(level, most int) *Stock {
	s := New(Config{Level: level, Most: most, Make: m.make, Quiet: func() bool { return !m.busy.Load() }, Room: m.room})
	s.Start()
	m.t.Cleanup(func() {
		s.Close()
		if n := m.open(); n > 0 {
			m.t.Errorf("%d volumes are left", n)
		}
	})
	return s
}

func kind(n int) Kind {
	return Kind{Template: fmt.Sprintf("ext4-%dm-0123456789abcdef", n), Form: Unnamed}
}

// levels waits until as many are ready as should be, and returns the levels by kind.
func levels(t *testing.T, s *Stock) map[Kind]int {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		shelves, _ := s.Shelves()
		levels, all := map[Kind]int{}, true
		for _, is := range shelves {
			if is.Level > 0 {
				levels[is.Kind] = is.Level
			}
			all = all && is.Ready == is.Level
		}
		if all {
			return levels
		}
		if time.Now().After(end) {
			t.Fatalf("%+v", shelves)
		}
	}
}

func mustHave(t *testing.T, s *Stock, want map[Kind]int) {
	t.Helper()
	if got := levels(t, s); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the levels are %v, want %v", got, want)
	}
}

// take takes a volume, which must be there or not, and closes it.
func take(t *testing.T, s *Stock, k Kind, want bool) {
	t.Helper()
	v := s.Take(k)
	if (v != nil) != want {
		t.Errorf("taking one of %v returned %v", k, v)
	}
	if v != nil {
		v.Close()
	} else if !want {
		s.Want(k, diskfs.Spec{})
	}
}

func TestLevels(t *testing.T) {
	m := &maker{t: t}
	s := m.newStock(2, 8)
	a, b, c, d := kind(1), kind(2), kind(3), kind(4)
	mustHave(t, s, map[Kind]int{})
	take(t, s, a, false)
	mustHave(t, s, map[Kind]int{a: 2})
	take(t, s, a, true)
	mustHave(t, s, map[Kind]int{a: 2})
	// One more than are ready.
	m.busy.Store(true)
	take(t, s, a, true)
	take(t, s, a, true)
	take(t, s, a, false)
	m.busy.Store(false)
	mustHave(t, s, map[Kind]int{a: 4})
	// Others make the level fall that is higher than it must be, and then the oldest kind go.
	take(t, s, b, false)
	take(t, s, c, false)
	mustHave(t, s, map[Kind]int{a: 4, b: 2, c: 2})
	// One that is asked for once drives out nobody.
	take(t, s, d, false)
	mustHave(t, s, map[Kind]int{a: 4, b: 2, c: 2})
	take(t, s, d, false)
	mustHave(t, s, map[Kind]int{a: 2, b: 2, c: 2, d: 2})
	take(t, s, a, true)
	for range 2 {
		take(t, s, kind(5), false)
	}
	mustHave(t, s, map[Kind]int{a: 2, c: 2, d: 2, kind(5): 2})
	// What is needed no more.
	s.mu.Lock()
	s.shelves[a].level, s.shelves[c].used = 2, time.Now().Add(-forgotten-time.Hour)
	s.mu.Unlock()
	s.lower(time.Now())
	s.nudge()
	mustHave(t, s, map[Kind]int{a: 2, d: 2, kind(5): 2})
	if n := m.open(); n != 6 {
		t.Errorf("%d volumes are open", n)
	}
}

// TestLower lowers a level of which half was never needed.
func TestLower(t *testing.T) {
	m := &maker{t: t}
	s := m.newStock(1, 8)
	take(t, s, kind(1), false)
	levels(t, s)
	s.mu.Lock()
	s.raise(s.shelves[kind(1)], 8)
	s.mu.Unlock()
	s.nudge()
	mustHave(t, s, map[Kind]int{kind(1): 8})
	for _, want := range []int{8, 4, 2, 1, 1} { // the first time it is not known yet what is needed
		s.lower(time.Now())
		s.nudge()
		mustHave(t, s, map[Kind]int{kind(1): want})
	}
}

func TestShort(t *testing.T) {
	m := &maker{t: t}
	s := m.newStock(4, 4)
	m.short.Store(true)
	take(t, s, kind(1), false)
	time.Sleep(50 * time.Millisecond)
	if n := m.open(); n != 0 {
		t.Errorf("%d volumes are open where there is no room", n)
	}
	m.short.Store(false)
	s.nudge()
	levels(t, s)
	s.Drain()
	if n := m.open(); n != 0 {
		t.Errorf("%d volumes are open after all were given back", n)
	}
	s.nudge()
	time.Sleep(50 * time.Millisecond)
	if n := m.open(); n != 0 {
		t.Errorf("%d volumes were made right after all were given back", n)
	}
}

// TestBusy has somebody wait for the node all the time.
func TestBusy(t *testing.T) {
	m := &maker{t: t}
	m.busy.Store(true)
	s := m.newStock(2, 2)
	start := time.Now()
	take(t, s, kind(1), false)
	levels(t, s)
	if took := time.Since(start); took < 2*patience {
		t.Errorf("two volumes were made in %s", took)
	}
}

func TestCannotBeMade(t *testing.T) {
	m := &maker{t: t}
	m.fail.Store(true)
	s := m.newStock(1, 2)
	take(t, s, kind(1), false)
	time.Sleep(50 * time.Millisecond)
	m.fail.Store(false)
	take(t, s, kind(1), false) // somebody made one, so it works again
	mustHave(t, s, map[Kind]int{kind(1): 1})
}

// TestNone keeps nothing.
func TestNone(t *testing.T) {
	s := New(Config{Level: 1})
	s.Start()
	if v := s.Take(kind(1)); v != nil {
		t.Error(v)
	}
	s.Want(kind(1), diskfs.Spec{})
	s.Drain()
	if shelves, taken := s.Shelves(); len(shelves)+len(taken) > 0 {
		t.Error(shelves, taken)
	}
	s.Close()
}

// TestManyTake has many take and want at once, with the race detector if the tests have it.
func TestManyTake(t *testing.T) {
	m := &maker{t: t}
	s := m.newStock(2, 12)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 200 {
				k := kind((i + j) % 5)
				if v := s.Take(k); v != nil {
					v.Close()
				} else {
					s.Want(k, diskfs.Spec{})
				}
				if j%50 == 0 {
					s.Drain()
				}
			}
		})
	}
	all.Wait()
	if n := m.open(); n > 12 {
		t.Errorf("%d volumes are open", n)
	}
}
