// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"slices"
	"strings"
	"testing"
)

// FuzzAttributes checks that the attributes of a mount are read correctly among other options.
func FuzzAttributes(f *testing.F) {
	for i, s := range []string{"", "ro,nosuid", "xnoexec,nodevx,roo,", "rw,relatime", "a\n", "\xff"} {
		f.Add(s, uint8(i*11))
	}
	f.Fuzz(func(t *testing.T, noise string, bits uint8) {
		var own []string
		for i, row := range attributes {
			if slices.Contains(strings.Split(noise, ","), row.word) {
				return // the noise is an option that the test sets itself
			}
			if bits&(1<<i) != 0 {
				own = append(own, row.word)
			}
		}
		var want uint64
		for i, row := range attributes {
			if bits&(1<<i) != 0 {
				want |= row.bit
			}
		}
		options := strings.Join(own, ",")
		for _, text := range []string{options, options + "," + noise, noise + "," + options} {
			if got := attrOfWords(text).bits(); got != want {
				t.Errorf("%q means %#x, not %#x", text, got, want)
			}
		}
	})
}
