// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// TestSums follows an image from before it is made until it is gone. It counts once at any time.
func TestSums(t *testing.T) {
	s := newSums()
	has := func(what string, want held) {
		t.Helper()
		if s.total != want {
			t.Errorf("%s: %+v, not %+v", what, s.total, want)
		}
	}
	d, growth := &Demand{Key: "volumes/a", Thin: 10, Now: 3}, &Demand{Thin: 5}
	s.begin(d)
	has("it is asked for", held{})
	s.count(d)
	s.count(d)
	has("it is promised", held{thin: 10})
	s.set("volumes/a", held{thin: 10, allocated: 2})
	has("it has its name", held{thin: 10, allocated: 2})
	s.end(d)
	s.end(d)
	has("it is made", held{thin: 10, allocated: 2})
	s.begin(growth)
	s.count(growth)
	has("it may grow", held{thin: 15, allocated: 2})
	s.set("volumes/a", held{thin: 15, allocated: 2})
	s.end(growth)
	has("it has grown", held{thin: 15, allocated: 2})
	s.drop("volumes/a")
	s.drop("volumes/a")
	has("it is gone", held{})
	failed := &Demand{Key: "volumes/b", Firm: 7}
	s.begin(failed)
	s.count(failed)
	has("another is promised", held{firm: 7})
	if s.makes("volumes/b") != failed || s.makes("volumes/a") != nil {
		t.Error("it is not known what is being made")
	}
	s.end(failed)
	has("it could not be made", held{})
}

// TestRandomSums changes sums at random, and compares them with what they are the sum of.
func TestRandomSums(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 2))
	s := newSums()
	var making []*Demand
	for step := range 50000 {
		key := fmt.Sprint("volumes/", dice.IntN(20))
		switch dice.IntN(5) {
		case 0:
			d := &Demand{Key: key, Thin: dice.Int64N(1000), Firm: dice.Int64N(1000)}
			s.begin(d)
			making = append(making, d)
		case 1, 2:
			if len(making) == 0 {
				continue
			}
			if i := dice.IntN(len(making)); dice.IntN(2) == 0 {
				s.count(making[i])
			} else {
				s.end(making[i])
				making = append(making[:i], making[i+1:]...)
			}
		case 3:
			s.set(key, held{dice.Int64N(1000), dice.Int64N(1000), dice.Int64N(1000)})
		case 4:
			s.drop(key)
		}
		var want held
		for _, h := range s.images {
			want = want.plus(*h)
		}
		for d, counts := range s.making {
			if counts {
				want = want.plus(d.held())
			}
		}
		if s.total != want || len(s.making) != len(making) {
			t.Fatalf("step %d: %+v, not %+v; %d are being made, not %d", step, s.total, want, len(s.making), len(making))
		}
	}
}

// TestOthers checks that others never seem to take more than is taken at all: a demand that fits
// beside all that is taken then fits, whatever the images have.
func TestOthers(t *testing.T) {
	for name, c := range map[string]struct{ used, ours, known, want int64 }{
		"nothing":                              {0, 0, 0, 0},
		"only claims":                          {50, 50, 0, 0},
		"templates and inline volumes":         {50, 20, 30, 30},
		"somebody else's files":                {90, 20, 30, 70},
		"claims that share extents":            {50, 80, 0, 0},
		"the same, with inline volumes":        {50, 80, 30, 30},
		"inline volumes that share extents":    {50, 0, 80, 50},
		"claims have freed space meanwhile":    {40, 50, 10, 10},
		"claims have taken more space by now":  {90, 50, 10, 40},
		"a pool that has shrunk to what it is": {0, 50, 10, 0},
	} {
		if got := others(c.used, c.ours, c.known); got != c.want {
			t.Errorf("%s: %d, not %d", name, got, c.want)
		}
	}
}

// TestFresh checks how long a measurement is kept.
func TestFresh(t *testing.T) {
	start := time.Now()
	for name, c := range map[string]struct {
		images int
		took   time.Duration
		age    time.Duration
		want   bool
	}{
		"none yet":            {},
		"few images":          {few, time.Second, time.Millisecond, false},
		"many, just measured": {few + 1, 10 * time.Millisecond, 10 * time.Millisecond, true},
		"many, for a while":   {10000, 10 * time.Millisecond, 999 * time.Millisecond, true},
		"many, too old":       {10000, 10 * time.Millisecond, 1001 * time.Millisecond, false},
	} {
		m := measurement{images: c.images, start: start, took: c.took}
		if got := m.fresh(start.Add(c.age)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestDiffer checks what counts as a mistake.
func TestDiffer(t *testing.T) {
	a, b := &held{thin: 1, allocated: 1}, &held{thin: 2, allocated: 1}
	for name, c := range map[string]struct {
		key     string
		was, is *held
		mistake bool
	}{
		"an inline volume":              {"volumes/v", nil, nil, false},
		"the same":                      {"volumes/v", a, a, false},
		"written to":                    {"volumes/v", a, &held{thin: 1, allocated: 9}, false},
		"another size":                  {"volumes/v", a, b, true},
		"not counted":                   {"volumes/v", nil, a, true},
		"not there":                     {"volumes/v", a, nil, true},
		"a snapshot takes less":         {"snapshots/s", &held{firm: 2, allocated: 2}, &held{firm: 1, allocated: 1}, false},
		"a snapshot is not counted":     {"snapshots/s", nil, a, true},
		"a snapshot is not there":       {"snapshots/s", a, nil, true},
		"a volume with its own promise": {"volumes/snapshots", a, b, true},
	} {
		if got := differ(c.key, c.was, c.is); (got != nil) != c.mistake || got != nil && got.key != c.key {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
