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
	held []Condition
}

// holder tells conditions apart over time. Their texts may change.
type holder struct{ code, object string }

func holderOf(c Condition) holder { return holder{c.Code, c.Object} }

// Look returns the conditions that hold now, each with since when. A condition that was missing
// once has ended, and begins anew when it comes back.
func (w *Watch) Look() []Condition {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now
	if w.Now != nil {
		now = w.Now
	}
	found, at := w.Find(), now()
	began, ended := stamp(w.held, found, at)
	w.held = append([]Condition(nil), found...) // the caller may change the slice that it gets
	for _, c := range ended {
		if w.Ended != nil {
			w.Ended(c, at.Sub(c.Since))
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
// returns the ones that have begun and ended between the two looks.
func stamp(before, found []Condition, now time.Time) (began, ended []Condition) {
	since := map[holder]time.Time{}
	for _, c := range before {
		since[holderOf(c)] = c.Since
	}
	holds := map[holder]bool{}
	for i := range found {
		c := &found[i]
		first, held := since[holderOf(*c)]
		if !held {
			first = now
		}
		if c.Since = first; !held && !holds[holderOf(*c)] {
			began = append(began, *c)
		}
		holds[holderOf(*c)] = true
	}
	for _, c := range before {
		if !holds[holderOf(c)] {
			holds[holderOf(c)] = true // once, if it was found twice
			ended = append(ended, c)
		}
	}
	return began, ended
}
