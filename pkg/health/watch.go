// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"sync"
	"time"
)

// Watch looks at conditions. It remembers since when each one holds, and reports when one begins
// and when it ends. Everybody who asks for the conditions asks the same Watch, so each change is
// reported once, whoever saw it first.
type Watch struct {
	// Find returns all conditions that hold now, in a slice of its own. Required. Watch calls it
	// once at a time, so that an answer that took long cannot undo a newer one.
	Find func() []Condition
	Now  func() time.Time // nil is time.Now
	// Began and Ended, if not nil, are called for each change, before Look returns. What Ended
	// gets is the condition as it was seen last.
	Began func(Condition)
	Ended func(c Condition, lasted time.Duration)

	mu   sync.Mutex
	held []seen
}

// seen is a condition, and when it was seen last.
type seen struct {
	Condition
	last time.Time
}

// linger is how long a condition that leaves the plugin ready may be missing before it has
// ended. A pool at the edge of its headroom comes and goes with each file that a pod writes.
const linger = 30 * time.Second

// lingers reports whether a condition that is missing at a moment has not ended yet.
func (s seen) lingers(now time.Time) bool { return s.StillReady && now.Sub(s.last) < linger }

// holder tells conditions apart over time. Their texts may change.
type holder struct{ code, object string }

func holderOf(c Condition) holder { return holder{c.Code, c.Object} }

// Look returns the conditions that hold now, each with since when. A condition that was missing
// has ended, and begins anew when it comes back. One that leaves the plugin ready has ended when
// it was missing for half a minute.
func (w *Watch) Look() []Condition {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now
	if w.Now != nil {
		now = w.Now
	}
	found, at := w.Find(), now()
	held, began, ended := stamp(w.held, found, at)
	w.held = held
	for _, s := range ended {
		if w.Ended != nil {
			w.Ended(s.Condition, at.Sub(s.Since))
		}
	}
	for _, c := range began {
		if w.Began != nil {
			w.Began(c)
		}
	}
	return found
}

// stamp fills in since when the conditions hold, given those that held at the look before. It
// returns what to remember, and what has begun and ended between the two looks.
func stamp(before []seen, found []Condition, now time.Time) (held []seen, began []Condition, ended []seen) {
	since := map[holder]time.Time{}
	for _, s := range before {
		since[holderOf(s.Condition)] = s.Since
	}
	holds := map[holder]bool{}
	for i := range found {
		c := &found[i]
		key := holderOf(*c)
		first, was := since[key]
		if !was {
			first = now
		}
		c.Since = first
		if holds[key] {
			continue
		}
		holds[key] = true
		held = append(held, seen{*c, now})
		if !was {
			began = append(began, *c)
		}
	}
	for _, s := range before {
		switch {
		case holds[holderOf(s.Condition)]:
		case s.lingers(now):
			held = append(held, s)
		default:
			ended = append(ended, s)
		}
	}
	return held, began, ended
}
