// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strconv"
	"strings"
	"unicode"
)

// printable is a text of somebody else as one line, which a terminal shows and does not obey: what has no glyph is
// written as Go writes it in a string, as \n and \x1b.
func printable(s string) string {
	if !strings.ContainsFunc(s, hasNoGlyph) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if hasNoGlyph(r) {
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func hasNoGlyph(r rune) bool { return !unicode.IsPrint(r) }

// printableLines is [printable] for a text whose lines are its own.
func printableLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	return strings.Join(lines, "\n")
}
