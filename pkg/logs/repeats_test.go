// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"strconv"
	"testing"
	"time"
)

func TestRepeats(t *testing.T) {
	start := time.Now()
	second := 0
	r := Repeats{Now: func() time.Time { return start.Add(time.Duration(second) * time.Second) }}
	for _, c := range []struct {
		at           int
		object, kind string
		show         bool
		left         int
	}{
		{0, "a", "Aborted", true, 0}, // the first
		{1, "a", "Aborted", false, 0},
		{2, "b", "Aborted", true, 0},  // another object
		{3, "a", "Internal", true, 0}, // another kind
		{4, "a", "Aborted", false, 0}, // and back
		{59, "a", "Aborted", false, 0},
		{60, "a", "Aborted", true, 3},
		{61, "a", "Aborted", false, 0},
		{64, "a", "Internal", true, 0},
		{200, "a", "Aborted", true, 1},
		{200, "b", "Aborted", true, 0},
	} {
		second = c.at
		if show, left := r.Failed(c.object, c.kind); show != c.show || left != c.left {
			t.Errorf("second %d, %s of %s: %v, %d left out; expected %v, %d", c.at, c.kind, c.object, show, left, c.show, c.left)
		}
	}
	if n := r.Succeeded("a"); n != 9 {
		t.Errorf("a failed %d times", n)
	}
	if n := r.Succeeded("a"); n != 0 {
		t.Errorf("after it succeeded, a failed %d times", n)
	}
	if show, left := r.Failed("a", "Aborted"); !show || left != 0 {
		t.Errorf("it fails anew: %v, %d", show, left)
	}
}

// TestRepeatsAreBounded has more objects fail than are remembered: the latest are.
func TestRepeatsAreBounded(t *testing.T) {
	now := time.Now()
	r := Repeats{Most: 10, Now: func() time.Time { now = now.Add(time.Millisecond); return now }}
	for i := range 10 {
		r.Failed(strconv.Itoa(i), "Internal")
	}
	r.Failed("0", "Internal") // not the oldest any more
	for i := range 3 {
		r.Failed("new-"+strconv.Itoa(i), "Internal")
	}
	if len(r.failing) != 10 {
		t.Errorf("%d objects are remembered", len(r.failing))
	}
	for object, want := range map[string]int{"0": 2, "1": 0, "2": 0, "3": 0, "4": 1, "new-0": 1, "new-2": 1} {
		if n := r.Succeeded(object); n != want {
			t.Errorf("%s failed %d times, expected %d", object, n, want)
		}
	}
}
