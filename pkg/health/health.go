// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package health is the one shape in which the plugin says that something is wrong: with
// a volume, the pool, the formatter, or the registration with kubelet.
//
// Whoever finds a condition makes a [Condition]; whoever shows one (CSI's health calls,
// Probe, /readyz, the log, the command doctor) needs no other text.
//
// A room lists what it needs as [Requirement] values. Their conditions are those of the running plugin, and
// its [Findings], which also say what is good, are the lines of /readyz?verbose and of doctor.
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
	Limited      Severity = iota - 1 // usable, and stays so until the node or its set-up is another one
	Degraded                         // usable
	Inaccessible                     // not usable on this node
	DataLoss                         // what it held is gone, or part of it
)

// The codes of conditions of the plugin as a whole: what /readyz and the metrics may report. The
// rooms that find them say when they hold. Conditions of single volumes have codes of their own.
const (
	PoolUnusable         = "PoolUnusable"
	PoolFull             = "PoolFull"
	FormatterUnavailable = "FormatterUnavailable"
	NotRegistered        = "NotRegistered"
	DiskImageGrown       = "DiskImageGrown"     // of a volume, which is the object
	DiskImageShortened   = "DiskImageShortened" // of a claim, which is the object
	DiskImageEmptied     = "DiskImageEmptied"   // of a claim, which is the object
	PrewarmPending       = "PrewarmPending"
	PrewarmFailed        = "PrewarmFailed" // of a template, or of a line or the whole of the list
	ContentFailed        = "ContentFailed" // of a content, or of an entry or the whole of the list
	GoldenFailed         = "GoldenFailed"  // of a commit, or of an entry or the whole of the list of shared goldens

	LoopUnavailable     = "LoopUnavailable"
	KubeletDirUnusable  = "KubeletDirUnusable"
	MountsNotShared     = "MountsNotShared"
	CapabilityMissing   = "CapabilityMissing" // the capability is the object
	DriverNameTaken     = "DriverNameTaken"
	LeftBehind          = "LeftBehind"
	PoolLimited         = "PoolLimited"
	NoThickClaims       = "NoThickClaims"
	DiskImagesUnbounded = "DiskImagesUnbounded"
	NoKVM               = "NoKVM"
	SlowMountTable      = "SlowMountTable"
)

// Codes are all codes of conditions of the plugin as a whole.
var Codes = []string{
	PoolUnusable, PoolFull, FormatterUnavailable, NotRegistered, DiskImageGrown, DiskImageShortened, DiskImageEmptied,
	PrewarmPending, PrewarmFailed, ContentFailed, GoldenFailed, LoopUnavailable, KubeletDirUnusable, MountsNotShared, CapabilityMissing,
	DriverNameTaken, LeftBehind, PoolLimited, NoThickClaims, DiskImagesUnbounded, NoKVM, SlowMountTable,
}

// Condition is one thing that is wrong.
type Condition struct {
	Code     string // CamelCase, stable: for machines
	Object   string // which of several with this code: a program's name; may be empty
	Severity Severity
	Text     string    // what is wrong, with which object, and why
	Cost     string    // what the plugin does less well because of it; may be empty if Text says it
	Remedy   string    // what to do about it; may be empty if Text says it
	Since    time.Time // when it was first seen; zero if nobody keeps track
	// StillReady means that the plugin is ready all the same: it does its work, and what it
	// refuses because of this condition, every plugin would refuse.
	StillReady bool
	// Requirement is the name of the [Requirement] that is not met, as [Look] fills it in.
	Requirement string
}

// Message is the text, what it costs, and what to do about it.
func (c Condition) Message() string { return message(c.Text, c.Cost, c.Remedy) }

func message(text, cost, remedy string) string {
	if cost != "" {
		text += "; " + cost
	}
	if remedy == "" {
		return text
	}
	return text + ": " + remedy
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

// Acute returns the conditions that are not [Limited]: those that came, and that somebody may end without another
// node or another set-up.
func Acute(conditions []Condition) (found []Condition) {
	for _, c := range conditions {
		if c.Severity != Limited {
			found = append(found, c)
		}
	}
	return found
}
