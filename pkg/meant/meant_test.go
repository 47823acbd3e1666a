// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package meant

import (
	"strings"
	"testing"
)

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"cache", "cache", 0}, {"cahce", "cache", 2}, {"cache", "caches", 1},
		{"cache", "ache", 1}, {"kitten", "sitting", 3},
	} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("%q and %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestSay(t *testing.T) {
	all := []string{"ci/cache", "shop/cache", "go-modules", "csi-4f0c1", "csi-4f0c2", "csi-4f0c3", "csi-4f0c4"}
	for typed, want := range map[string]string{
		"ci/cahce":      "did you mean ci/cache?",
		"cache":         "did you mean ci/cache or shop/cache?",
		"ci/go-modules": "did you mean go-modules?",
		"go-":           "did you mean go-modules?",
		"csi-4f0c9":     "did you mean csi-4f0c1 or csi-4f0c2 or csi-4f0c3?",
		"g":             "nothing is near",
		"ci/database":   "nothing is near",
	} {
		if got := Say(typed, all, "nothing is near"); got != want {
			t.Errorf("%s: %s, want %s", typed, got, want)
		}
	}
	if got := Names(strings.Repeat("x", 1000), all); got != nil {
		t.Errorf("%v", got)
	}
}
