// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// TestLeftovers checks after which sweeps something is left, and what to do about it.
func TestLeftovers(t *testing.T) {
	done := sweep.Action{Verb: sweep.Delete, Object: "volume a", Reason: "its pod is gone", Result: sweep.Done}
	skipped := sweep.Action{Verb: sweep.Detach, Object: "loop7", Result: sweep.Skipped}
	failed := sweep.Action{Verb: sweep.Delete, Object: "volume b", Reason: "its pod is gone", Result: "it is busy"}
	left := sweep.Action{Verb: sweep.Leave, Object: "mount c", Reason: "it is of nobody"}
	planned := sweep.Action{Verb: sweep.Thaw, Object: "volume d", Reason: "an earlier plugin froze it"}
	var l leftovers
	if found := l.conditions(); found != nil || l.describe() != "no sweep was made yet" {
		t.Errorf("before the first sweep: %+v, %q", found, l.describe())
	}
	for name, c := range map[string]struct {
		actions []sweep.Action
		text    string // of what is left; "" if nothing is
		remedy  string
	}{
		"nothing was found": {nil, "", ""},
		"all went":          {[]sweep.Action{done, skipped}, "", ""},
		"one failed":        {[]sweep.Action{done, failed}, "left 1 things behind, of which the first is volume b: its pod is gone", "gc --dry-run"},
		"one is left":       {[]sweep.Action{left, planned}, "left 2 things behind, of which the first is mount c", "gc --dry-run"},
		"planned":           {[]sweep.Action{planned}, "the first is volume d", "start the plugin"},
	} {
		l.note(c.actions)
		found := l.conditions()
		if c.text == "" {
			if found != nil || l.describe() != "nothing was left behind" {
				t.Errorf("%s: %+v, %q", name, found, l.describe())
			}
			continue
		}
		if len(found) != 1 || !found[0].StillReady || !strings.Contains(found[0].Text, c.text) || !strings.Contains(found[0].Remedy, c.remedy) {
			t.Errorf("%s: %+v", name, found)
		}
	}
}
