// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"slices"
	"sync"
	"time"
)

// Seldomly returns the requirements in a form that everybody may look at all the time: a look at one that is
// Seldom returns what the last trial found, at first nothing. The trials are made by the function try, of those
// whose last trial is older than age. It returns when they are made. One that somebody else makes meanwhile, or
// that hangs on a disk, it does not wait for. What hangs on a disk for half a minute is a condition.
func Seldomly(requirements []Requirement) (all []Requirement, try func(age time.Duration)) {
	var trials []*trial
	for _, r := range requirements {
		if r.Seldom {
			t := &trial{look: r.Look, code: r.Code}
			trials = append(trials, t)
			r.Look = t.last
		}
		all = append(all, r)
	}
	return all, func(age time.Duration) {
		for _, t := range trials {
			t.make(age)
		}
	}
}

// trial is a look that is made seldom, and what it found.
type trial struct {
	look   func() []Condition
	code   string
	making sync.Mutex // held during a look

	mu    sync.Mutex
	found []Condition
	made  time.Time
	begun time.Time // of the look that is being made, or zero
}

// hangs is how long a look may take that is not said to hang. On a disk under load one takes a second.
const hangs = 30 * time.Second

func (t *trial) make(age time.Duration) {
	if !t.making.TryLock() {
		return
	}
	defer t.making.Unlock()
	if t.younger(age) {
		return
	}
	t.begin()
	found := t.look()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.found, t.made, t.begun = found, time.Now(), time.Time{}
}

func (t *trial) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.begun = time.Now()
}

func (t *trial) younger(age time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.made.IsZero() && time.Since(t.made) < age
}

func (t *trial) last() []Condition {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.code != "" && !t.begun.IsZero() && time.Since(t.begun) >= hangs {
		return []Condition{{
			Code: t.code, Severity: Inaccessible, Text: "a trial that began at " + t.begun.UTC().Format(time.RFC3339) + " has not ended",
			Remedy: "see the kernel log for a disk that does not answer: the pool's, or one below it; the trial ends when that answers",
		}}
	}
	return slices.Clone(t.found)
}
