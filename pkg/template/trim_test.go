// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"strings"
	"testing"
	"time"
)

// TestExcess works in units of MiB, so that the reasons are readable. The last use of each
// template is given as an hour.
func TestExcess(t *testing.T) {
	const u = 1 << 20
	at := func(hour int, key string, bytes int64, keep bool) entry {
		return entry{key: key, bytes: bytes * u, used: time.Date(2026, 1, 2, hour, 0, 0, 0, time.UTC), keep: keep}
	}
	a, b, c := at(1, "a", 10, false), at(2, "b", 20, false), at(3, "c", 30, false)
	kept := func(e entry) entry { e.keep = true; return e }
	retained := func(e entry) entry { e.retain = true; return e }
	for name, test := range map[string]struct {
		entries []entry
		budget  int64
		want    string
	}{
		"none":                       {nil, 0, ""},
		"within":                     {[]entry{c, a, b}, 60, ""},
		"one byte too many":          {[]entry{c, a, b}, 59, "a"},
		"the oldest is enough":       {[]entry{c, a, b}, 50, "a"},
		"the oldest is not enough":   {[]entry{c, a, b}, 49, "a b"},
		"all":                        {[]entry{c, a, b}, 29, "a b c"},
		"nothing may stay":           {[]entry{c, a, b}, 0, "a b c"},
		"the oldest is kept":         {[]entry{c, kept(a), b}, 50, "b"},
		"the latest is kept":         {[]entry{kept(c), a, b}, 0, "a b"},
		"all are kept":               {[]entry{kept(c), kept(a), kept(b)}, 0, ""},
		"too much is kept":           {[]entry{kept(c), a, b}, 29, "a b"},
		"the oldest is retained":     {[]entry{c, retained(a), b}, 40, "b"},
		"retained and too much":      {[]entry{c, retained(a), b}, 9, "b c a"},
		"all are retained":           {[]entry{retained(c), retained(a), retained(b)}, 59, "a"},
		"nobody knows when":          {[]entry{a, b, {key: "z", bytes: u}}, 30, "z"},
		"used at the same time":      {[]entry{at(1, "y", 1, false), at(1, "x", 1, false), c}, 31, "x"},
		"larger ones are not spared": {[]entry{at(1, "old", 1, false), at(2, "large", 100, false)}, 50, "old large"},
	} {
		t.Run(name, func(t *testing.T) {
			var keys []string
			for _, r := range excess(test.entries, test.budget*u) {
				keys = append(keys, r.key)
				for _, says := range []string{"--template-cache", "least recently used"} {
					if !strings.Contains(r.reason, says) {
						t.Errorf("%s: the reason does not say %s: %s", r.key, says, r.reason)
					}
				}
			}
			if got := strings.Join(keys, " "); got != test.want {
				t.Errorf("removes %q, want %q", got, test.want)
			}
		})
	}
	want := "templates take 50Mi, more than the 49Mi of --template-cache, and this one is the least recently used, at 2026-01-02 02:00:00"
	if got := excess([]entry{c, a, b}, 49*u)[1].reason; got != want {
		t.Errorf("the reason is %q, want %q", got, want)
	}
	want = "templates take 10Mi, more than the 9Mi of --template-cache, and this one is the least recently used" +
		" of those that --prewarm and --prewarm-file list, at 2026-01-02 01:00:00"
	if got := excess([]entry{retained(a)}, 9*u)[0].reason; got != want {
		t.Errorf("the reason is %q, want %q", got, want)
	}
}
