// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package health

import (
	"slices"
	"time"
)

// Requirement is one thing that the plugin needs of its node, of its pool, or of what its operator gives it.
type Requirement struct {
	// Name is for people and machines, and stable: lower-case words with hyphens.
	Name string
	// Look returns the conditions that hold, in a slice of its own. Without any, the requirement is met.
	Look func() []Condition
	// Good describes what meets the requirement, for people, if no condition holds. "" means that nothing
	// can be said of it now.
	Good func() string
	// Seldom means that Look tries something, which takes milliseconds or waits for a disk: see [Seldomly].
	Seldom bool
	// Code is that of the condition which holds while a Look that is Seldom hangs. "" is for one that waits for no disk.
	Code string
}

// Look returns the conditions of all requirements, with the names of the requirements.
func Look(requirements []Requirement) (found []Condition) {
	for _, r := range requirements {
		for _, c := range r.Look() {
			c.Requirement = r.Name
			found = append(found, c)
		}
	}
	return found
}

// State says how well a requirement is met.
type State string

// The states, from the best.
const (
	StateGood     State = "good"
	StateDegraded State = "degraded" // the plugin does its work, and something is missing or slower
	StateBroken   State = "broken"   // the plugin is not ready
)

// Finding is what a look found about a requirement: that it is met, or a condition.
type Finding struct {
	State       State     `json:"state"`
	Requirement string    `json:"requirement"`
	Text        string    `json:"text"`
	Cost        string    `json:"cost,omitempty"`   // what the plugin does less well
	Remedy      string    `json:"remedy,omitempty"` // what to do
	Code        string    `json:"code,omitempty"`   // of the condition
	Object      string    `json:"object,omitempty"`
	Since       time.Time `json:"since,omitzero"`
}

// Message is the text, what it costs, and what to do.
func (f Finding) Message() string { return message(f.Text, f.Cost, f.Remedy) }

// Findings describes all requirements, given the conditions that hold: at least one finding for each, in their
// order, and behind them conditions of none of them.
func Findings(requirements []Requirement, held []Condition) (found []Finding) {
	for _, r := range requirements {
		n := len(found)
		for _, c := range held {
			if c.Requirement == r.Name {
				found = append(found, c.finding())
			}
		}
		if len(found) > n {
			continue
		}
		if text := r.Good(); text != "" {
			found = append(found, Finding{State: StateGood, Requirement: r.Name, Text: text})
		}
	}
	for _, c := range held {
		if !slices.ContainsFunc(requirements, func(r Requirement) bool { return r.Name == c.Requirement }) {
			found = append(found, c.finding())
		}
	}
	return found
}

func (c Condition) finding() Finding {
	state := StateBroken
	if c.StillReady {
		state = StateDegraded
	}
	return Finding{
		State: state, Requirement: c.Requirement, Text: c.Text, Cost: c.Cost, Remedy: c.Remedy, Code: c.Code, Object: c.Object, Since: c.Since,
	}
}

// Worst is the worst state of all findings.
func Worst(findings []Finding) State {
	worst := StateGood
	for _, f := range findings {
		if f.State == StateBroken || f.State == StateDegraded && worst == StateGood {
			worst = f.State
		}
	}
	return worst
}
