// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import "cmp"

// Lineage says which golden a volume starts from, and which one it becomes the next generation of, as its request
// has it. Package golden reads and checks the words. The zero value is a volume without goldens.
type Lineage struct {
	From       string     `json:"from,omitempty"`       // golden/NAME or shared/NAME
	OrElse     string     `json:"orElse,omitempty"`     // what it starts from where there is no such golden: the same, or content/NAME
	CommitTo   string     `json:"commitTo,omitempty"`   // NAME or shared/NAME
	CommitWhen CommitWhen `json:"commitWhen,omitempty"` // empty is [CommitMarked]
}

// CommitWhen is the condition on which a volume becomes a generation of a golden.
type CommitWhen string

// The conditions.
const (
	CommitMarked CommitWhen = "marked" // its pod has made the file [CommitMark]
	CommitAlways CommitWhen = "always"
)

// CommitMark is the file in a volume's root directory that asks for the commit. It is not part of what is
// committed.
const CommitMark = CommitDir + "/" + CommitName

// The directory and the name of [CommitMark].
const (
	CommitDir  = ".disktemplate"
	CommitName = "commit"
)

// Condition is the condition, with its default.
func (l Lineage) Condition() CommitWhen { return cmp.Or(l.CommitWhen, CommitMarked) }
