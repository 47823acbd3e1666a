// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package meant guesses which name somebody meant who has typed another one.
package meant

import (
	"cmp"
	"slices"
	"strings"
)

const (
	mostNear  = 3 // names in a message
	fewDiffer = 2 // characters of two names that may be mistaken for each other
	longStart = 3 // characters that are enough to be the beginning of a name
)

// Names returns at most three of all names that may be meant by the one that was typed, the nearest first: those
// that differ by a slip, that begin with it, or that have the same last part in another namespace.
func Names(typed string, all []string) (near []string) {
	for _, name := range all {
		if isNear(typed, name) && !slices.Contains(near, name) {
			near = append(near, name)
		}
	}
	slices.SortStableFunc(near, func(a, b string) int { return cmp.Compare(distance(a, typed), distance(b, typed)) })
	return near[:min(len(near), mostNear)]
}

// Say returns "did you mean …?", or otherwise if no name is near.
func Say(typed string, all []string, otherwise string) string {
	near := Names(typed, all)
	if len(near) == 0 {
		return otherwise
	}
	return "did you mean " + strings.Join(near, " or ") + "?"
}

func isNear(typed, name string) bool {
	begins := len(typed) >= longStart && strings.HasPrefix(name, typed)
	return begins || lastPart(typed) == lastPart(name) || distance(typed, name) <= fewDiffer
}

// lastPart is what stands behind the last slash.
func lastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// distance is how many characters of a must be changed, left out or put in to make it b: Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0] // of the row above, one to the left
		row[0] = i + 1
		for j := range len(b) {
			changed := before
			if a[i] != b[j] {
				changed++
			}
			before = row[j+1]
			row[j+1] = min(changed, before+1, row[j]+1)
		}
	}
	return row[len(b)]
}
