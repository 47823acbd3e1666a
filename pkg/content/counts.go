// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import "errors"

// State is how far a content of the list is.
type State string

// The states.
const (
	Known     State = "known"     // its digest is known: volumes can have it
	Resolving State = "resolving" // its digest is being found out for the first time
	Failing   State = "failing"   // its source could not be read the last time, which is a condition
)

// States are all of them.
var States = []State{Known, Resolving, Failing}

// Counts counts the contents of the list by their states, each from 0.
func (c *Contents) Counts() map[State]int {
	counts := map[State]int{}
	for _, s := range States {
		counts[s] = 0
	}
	for _, d := range c.Describe() {
		counts[d.state()]++
	}
	return counts
}

func (d Described) state() State {
	switch {
	case errors.Is(d.Err, ErrResolving):
		return Resolving
	case d.Err != nil:
		return Failing
	}
	return Known
}
