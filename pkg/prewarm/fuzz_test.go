// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"bytes"
	"testing"
	"unicode/utf8"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
)

// FuzzFile reads lists. What is accepted is valid, and listed once. What is refused is said briefly, with its line.
func FuzzFile(f *testing.F) {
	for _, s := range []string{
		"", "xfs:10Gi\n# c\n\next4:1Gi:inode-size=512", "xfs:1Gi\r\nxfs:1024Mi\r\nraw:1Gi", "\xff\n\x00:\n:::", "a#b\n#",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		specs, bad := parse(content)
		for i, s := range specs {
			if err := s.Validate(); err != nil {
				t.Error(err)
			}
			for _, other := range specs[:i] {
				if other.Equal(s) {
					t.Errorf("%s is listed twice", s)
				}
			}
		}
		lines := bytes.Count(content, []byte("\n")) + 1
		if len(specs)+len(bad) > lines {
			t.Errorf("%d templates and %d bad lines of %d", len(specs), len(bad), lines)
		}
		for i, b := range bad {
			text := b.err.Error()
			if b.number > lines || i > 0 && b.number <= bad[i-1].number || !utf8.ValidString(text) || len(text) > 700 {
				t.Errorf("line %d of %d: %.800q", b.number, lines, text)
			}
			for _, fault := range plain.Faults(text) {
				t.Errorf("%s: %s", fault, text)
			}
		}
	})
}
