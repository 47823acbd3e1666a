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

// The codes of conditions of the plugin as a whole: what /readyz and the metrics may report. The
// rooms that find them say when they hold. Conditions of single volumes have codes of their own.
const (
	PoolUnusable         = "PoolUnusable"
	PoolFull             = "PoolFull"
	FormatterUnavailable = "FormatterUnavailable"
	NotRegistered        = "NotRegistered"
	DiskImageGrown       = "DiskImageGrown" // of a volume, which is the object
	PrewarmPending       = "PrewarmPending"
	PrewarmFailed        = "PrewarmFailed" // of a template, or of a line or the whole of the list
	ContentFailed        = "ContentFailed" // of a content, or of an entry or the whole of the list
	GoldenFailed         = "GoldenFailed"  // of a commit, or of an entry or the whole of the list of shared goldens
)

// Codes are all codes of conditions of the plugin as a whole.
var Codes = []string{
	PoolUnusable, PoolFull, FormatterUnavailable, NotRegistered, DiskImageGrown, PrewarmPending, PrewarmFailed,
	ContentFailed, GoldenFailed,
}

// Condition is one thing that is wrong.
type Condition struct {
	Code     string // CamelCase, stable: for machines
	Object   string // which of several with this code: a program's name; may be empty
	Severity Severity
	Text     string    // what is wrong, with which object, and why
	Remedy   string    // what to do about it; may be empty if Text says it
	Since    time.Time // when it was first seen; zero if nobody keeps track
	// StillReady means that the plugin is ready all the same: it does its work, and what it
	// refuses because of this condition, every plugin would refuse.
	StillReady bool
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

// Unready returns the conditions that keep the plugin from being ready.
func Unready(conditions []Condition) (found []Condition) {
	for _, c := range conditions {
		if !c.StillReady {
			found = append(found, c)
		}
	}
	return found
}
