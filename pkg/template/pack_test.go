// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"slices"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
)

// TestParts joins ranges across the smallest holes, and fills no hole that would take much space.
func TestParts(t *testing.T) {
	ranges := []sparse.Extent{{Start: 0, End: 100}, {Start: 101, End: 200}, {Start: 1200, End: 1300}, {Start: 1303, End: 1400}, {Start: 1430, End: 1500}}
	three := []sparse.Extent{{Start: 0, End: 200}, {Start: 1200, End: 1400}, {Start: 1430, End: 1500}}
	two := []sparse.Extent{{Start: 0, End: 200}, {Start: 1200, End: 1500}}
	for n, want := range map[int][]sparse.Extent{
		1: two, // the largest hole is more than an eighth of the data
		2: two,
		3: three,
		4: {{Start: 0, End: 200}, {Start: 1200, End: 1300}, {Start: 1303, End: 1400}, {Start: 1430, End: 1500}},
		5: ranges,
		9: ranges,
	} {
		if got := parts(ranges, n); !slices.Equal(got, want) {
			t.Errorf("at most %d: %v, want %v", n, got, want)
		}
	}
	if got := parts(nil, 3); len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
}
