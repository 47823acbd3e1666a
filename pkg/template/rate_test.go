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
	clock := func() time.Time { return now }
	p := newPace(3)
	p.now = clock
	take := func(ok bool, says ...string) *turn {
		t.Helper()
		turn, err := p.take()
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
	// Three at once, then one each 20 minutes.
	use()
	use()
	unused := take(true)
	take(false, "--max-template-builds-per-hour 3", "try again in 20m")
	unused.end()
	use()
	now = now.Add(20*time.Minute - 2*time.Second)
	take(false, "try again in 2s", "kind")
	now = now.Add(3 * time.Second) // a refusal names at most a second too many
	use()
	take(false, "try again in 19m59s")
	now = now.Add(20 * time.Minute)
	use()
	take(false)

	// A turn that was given back late counts as if it had never been taken. The bucket was
	// refilled meanwhile, and holds no more than it did.
	now = now.Add(24 * time.Hour)
	unused = take(true)
	now = now.Add(time.Hour)
	unused.end()
	for range 3 {
		use()
	}
	take(false, "try again in 20m")

	// Builds at every moment that is allowed: in any hour after the first, no more than three.
	for hour := range 10 {
		builds := 0
		for range 3600 {
			now = now.Add(time.Second)
			if turn, err := p.take(); err == nil {
				turn.used = true
				turn.end()
				builds++
			}
		}
		if builds < 2 || builds > 3 {
			t.Errorf("hour %d: %d builds, want 3", hour, builds)
		}
	}

	p = newPace(0)
	p.now = clock
	for range 1000 {
		use()
	}
}

// TestRefusalIsShort checks the wait that the default leads to: seconds, where it was up to an
// hour.
func TestRefusalIsShort(t *testing.T) {
	now := time.Now()
	p := newPace(DefaultBuildsPerHour)
	p.now = func() time.Time { return now }
	for range DefaultBuildsPerHour {
		if _, err := p.take(); err != nil {
			t.Fatal(err)
		}
	}
	_, err := p.take()
	if err == nil || !strings.Contains(err.Error(), "try again in 30s") && !strings.Contains(err.Error(), "try again in 31s") {
		t.Errorf("%v, want 30 seconds", err)
	}
	now = now.Add(31 * time.Second)
	if _, err := p.take(); err != nil {
		t.Errorf("after the time that was named: %v", err)
	}
}
