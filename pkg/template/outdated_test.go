// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"math"
	"strings"
	"testing"
	"time"
)

// TestMostLately chooses among kinds whose last use is given as an hour.
func TestMostLately(t *testing.T) {
	at := func(hour int) time.Time { return time.Date(2026, 1, 2, hour, 0, 0, 0, time.UTC) }
	kind := func(key string, hour int, bytes int64) Outdated {
		return Outdated{key: key, Used: at(hour), bytes: bytes}
	}
	a, b, c := kind("a", 1, 10), kind("b", 2, 20), kind("c", 3, 30)
	for name, test := range map[string]struct {
		all   []Outdated
		since int
		bytes int64
		most  int
		want  string
	}{
		"none":                      {nil, 0, 100, 0, ""},
		"all":                       {[]Outdated{b, c, a}, 0, math.MaxInt64, 0, "c b a"},
		"not those of long ago":     {[]Outdated{a, b, c}, 2, 100, 0, "c b"},
		"none of late":              {[]Outdated{a, b, c}, 4, 100, 0, ""},
		"they fit":                  {[]Outdated{a, b, c}, 0, 60, 0, "c b a"},
		"one byte too many":         {[]Outdated{a, b, c}, 0, 59, 0, "c b"},
		"a smaller one fits":        {[]Outdated{a, b, c}, 0, 49, 0, "c a"},
		"no room":                   {[]Outdated{a, b, c}, 0, 0, 0, ""},
		"so many":                   {[]Outdated{a, b, c}, 0, 60, 2, "c b"},
		"of two formatters":         {[]Outdated{a, kind("a", 4, 11), b}, 0, 60, 0, "a b"},
		"used at the same time":     {[]Outdated{kind("y", 1, 1), kind("x", 1, 1)}, 0, 60, 0, "y x"},
		"nobody knows when":         {[]Outdated{{key: "z"}, a}, 0, 60, 0, "a"},
		"one of two does not count": {[]Outdated{a, kind("a", 4, 11), b}, 0, 60, 2, "a b"},
	} {
		var keys []string
		for _, o := range mostLately(test.all, at(test.since), test.bytes, test.most) {
			keys = append(keys, o.key)
		}
		if got := strings.Join(keys, " "); got != test.want {
			t.Errorf("%s: chose %q, want %q", name, got, test.want)
		}
	}
}
