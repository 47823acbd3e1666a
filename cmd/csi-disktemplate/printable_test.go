// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// TestHostileTexts prints texts with which a pod would have a terminal do something, or print a line of its own.
func TestHostileTexts(t *testing.T) {
	const hostile, shown = "é\x1b]0;OWNED\a\x1b[2J\tx\u202ey\xff", `é\x1b]0;OWNED\a\x1b[2J\tx\u202ey` + "\ufffd"
	var b strings.Builder
	if err := printFields(&b, hostile, []field{{hostile, hostile + "\n" + hostile}, {name: hostile}}); err != nil {
		t.Fatal(err)
	}
	column := []column[string]{{title: "NAME", text: func(s string) string { return s }}}
	if err := printTable(&b, column, []string{hostile, "two\nlines"}, ""); err != nil {
		t.Fatal(err)
	}
	k := thing[string]{name: func(s string) string { return s }}
	if err := k.print(&b, []string{hostile}, "name"); err != nil {
		t.Fatal(err)
	}
	b.WriteString(findingLines([]health.Finding{{State: health.StateGood, Requirement: hostile, Text: hostile, Cost: hostile, Remedy: hostile}}))
	b.WriteString(printableLines("an error\nof " + hostile))
	if n := strings.Count(b.String(), shown); n != 12 {
		t.Errorf("the text is shown %d times", n)
	}
	if !strings.Contains(b.String(), `two\nlines`) {
		t.Error("a cell has two lines")
	}
	for line := range strings.Lines(b.String()) {
		if line = strings.TrimSuffix(line, "\n"); strings.ContainsFunc(line, hasNoGlyph) {
			t.Errorf("a terminal obeys %q", line)
		}
	}
}
