// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestRate takes turns while it moves the clock by hand.
func TestRate(t *testing.T) {
	now := time.Now()
	r := rate{most: 3, now: func() time.Time { return now }}
	take := func(ok bool, says ...string) *turn {
		t.Helper()
		turn, err := r.take()
		if (err == nil) != ok || err != nil && !errors.Is(err, ErrTooMany) {
			t.Fatalf("at %s take returned %v, want success: %v", now, err, ok)
		}
		for _, s := range says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("the error does not say %s: %v", s, err)
			}
		}
		return turn
	}
	use := func() {
		t.Helper()
		turn := take(true)
		turn.used = true
		turn.end()
	}
	use()
	now = now.Add(10 * time.Minute)
	use()
	unused := take(true)
	take(false, "--max-template-builds-per-hour 3", "50m1s")
	unused.end()
	use()
	now = now.Add(50*time.Minute - 1)
	take(false, "try again in 1s")
	now = now.Add(1)
	use() // the first is an hour ago
	take(false, "10m1s")
	now = now.Add(10 * time.Minute)
	use()
	use()
	take(false, "50m1s")
	now = now.Add(24 * time.Hour)
	for range 3 {
		use()
	}
	take(false)
	if len(r.begun) != 3 {
		t.Errorf("it remembers %v, want 3 turns", r.begun)
	}
	r = rate{now: r.now}
	for range 1000 {
		use()
	}
	if len(r.begun) != 0 {
		t.Errorf("it remembers %d turns, and has no limit", len(r.begun))
	}
}
