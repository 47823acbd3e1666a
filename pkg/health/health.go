// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package health is the one shape in which the plugin says that something is wrong: with
// a volume, the pool, the formatter, or the registration with kubelet.
//
// Whoever finds a condition makes a [Condition]; whoever shows one (CSI's health calls,
// Probe, /readyz, the log) needs no other text.
//
// Source: CSI 1.13, "VolumeHealth" and "NodeGetStorageHealth", for the severities.
package health

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// Severity is how bad a condition is.
type Severity int

// The severities, from the least.
const (
	Degraded     Severity = iota // usable
	Inaccessible                 // not usable on this node
	DataLoss                     // what it held is gone, or part of it
)

// Condition is one thing that is wrong.
type Condition struct {
	Code     string // CamelCase, stable: for machines
	Object   string // which of several with this code: a program's name; may be empty
	Severity Severity
	Text     string    // what is wrong, with which object, and why
	Remedy   string    // what to do about it; may be empty if Text says it
	Since    time.Time // when it was first seen; zero if nobody keeps track
}

// Message is the text and what to do about it.
func (c Condition) Message() string {
	if c.Remedy == "" {
		return c.Text
	}
	return c.Text + ": " + c.Remedy
}

// Err joins conditions to one error, or returns nil if there is none.
func Err(conditions []Condition) error {
	var errs []error
	for _, c := range conditions {
		errs = append(errs, fmt.Errorf("%s: %s", c.Code, c.Message()))
	}
	return errors.Join(errs...)
}

// holder tells conditions apart over time. Their texts may change.
type holder struct{ code, object string }

// Watch remembers since when each condition holds. Its zero value is usable.
type Watch struct {
	mu    sync.Mutex
	since map[holder]time.Time
}

// Stamp fills in Since, given all conditions that hold at the moment now. A condition that
// is missing has ended, and begins anew when it comes back.
func (w *Watch) Stamp(conditions []Condition, now time.Time) []Condition {
	w.mu.Lock()
	defer w.mu.Unlock()
	since := map[holder]time.Time{}
	for i, c := range conditions {
		key := holder{c.Code, c.Object}
		first, ok := w.since[key]
		if !ok {
			first = now
		}
		since[key], conditions[i].Since = first, first
	}
	w.since = since
	return conditions
}
