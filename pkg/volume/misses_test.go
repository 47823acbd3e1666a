// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"strconv"
	"testing"
)

// TestMissesAreBounded notes more volumes than are remembered: the latest are.
func TestMissesAreBounded(t *testing.T) {
	var m misses
	for i := range mostMisses {
		m.note(strconv.Itoa(i))
	}
	m.note("0") // asked again, so it is not the oldest any more
	for i := range 10 {
		m.note("new-" + strconv.Itoa(i))
	}
	if len(m.noted) != mostMisses {
		t.Errorf("%d volumes are remembered", len(m.noted))
	}
	for id, want := range map[string]bool{"0": true, "1": false, "10": false, "11": true, "new-0": true, "new-9": true, "never": false} {
		if m.has(id) != want {
			t.Errorf("volume %s: %v", id, !want)
		}
	}
	m.forget("11")
	if m.has("11") {
		t.Error("it forgets nothing")
	}
}
