// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import "testing"

// TestTrims follows a filesystem that returns its space late, or never.
func TestTrims(t *testing.T) {
	const u = worthTrimming
	var is trim
	for i, step := range []struct {
		unused, after int64 // before and after trimming, if that is worth it
		worth         bool
	}{
		{unused: u / 2, worth: false},
		{unused: 3 * u, after: u, worth: true}, // it keeps some,
		{unused: u, after: u, worth: true},     // which may be late
		{unused: u, after: u, worth: true},
		{unused: u, worth: false}, // it was not
		{unused: 3 * u, after: 3 * u, worth: true},
		{unused: 3 * u, after: u, worth: true}, // it was late
		{unused: u + u/2, worth: false},
		{unused: u * 2, after: u / 2, worth: true},
		{unused: u * 3 / 2, after: u / 2, worth: true}, // it keeps less than it did
	} {
		if worth := is.worth(step.unused); worth != step.worth {
			t.Fatalf("step %d: %+v with %d unused is worth it: %v", i, is, step.unused, worth)
		}
		if step.worth {
			is = is.after(step.after)
		}
	}
}
