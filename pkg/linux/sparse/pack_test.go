// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sparse

import (
	"slices"
	"testing"
)

// TestParts joins ranges across the smallest holes, and fills no hole that would take much space.
func TestParts(t *testing.T) {
	of := func(bounds ...int64) (ranges []Extent) {
		for b := range slices.Chunk(bounds, 2) {
			ranges = append(ranges, Extent{Start: b[0], End: b[1]})
		}
		return ranges
	}
	ranges := of(0, 100, 101, 200, 1200, 1300, 1303, 1400, 1430, 1500)
	two := of(0, 200, 1200, 1500)
	for n, want := range map[int][]Extent{
		1: two, // the largest hole is more than an eighth of the data
		2: two,
		3: of(0, 200, 1200, 1400, 1430, 1500),
		4: of(0, 200, 1200, 1300, 1303, 1400, 1430, 1500),
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
