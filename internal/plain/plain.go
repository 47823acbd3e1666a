// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package plain finds what does not belong into a message for users: the words of Go, of its
// parsers and of its formatting, and clauses that are said twice.
package plain

import (
	"fmt"
	"regexp"
	"strings"
)

var (
	// quoted is what a message repeats of a user's text, which may be anything.
	quoted = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)

	foreign = []*regexp.Regexp{
		regexp.MustCompile(`strconv|pflag|cobra|unmarshal|json:|unexpected (?:EOF|end)|invalid (?:syntax|character)|out of range:? value|parse error`),
		regexp.MustCompile(`%!|<nil>|\bnil\b|runtime error|goroutine`),
		regexp.MustCompile(`map\[|\[\]|[&*][a-zA-Z]+[.{]|\b(?:struct field|u?int(?:8|16|32|64)?|float64|interface \{\})\b`), // Go's types
		regexp.MustCompile(`\[[^\]]*\]`),     // a slice, as fmt prints it
		regexp.MustCompile(`\{[^}]*\}`),      // a struct
		regexp.MustCompile(`0x[0-9a-f]{9,}`), // an address
	}
)

// Faults returns what is wrong with a message. Texts in double quotes are left out.
func Faults(message string) (faults []string) {
	text := quoted.ReplaceAllString(message, `""`)
	for _, f := range foreign {
		for _, found := range f.FindAllString(text, -1) {
			faults = append(faults, fmt.Sprintf("%q is not for users", found))
		}
	}
	seen := map[string]bool{}
	for clause := range strings.SplitSeq(strings.ReplaceAll(text, "; ", ": "), ": ") {
		if clause = strings.TrimSpace(clause); len(clause) > 3 && seen[clause] {
			faults = append(faults, fmt.Sprintf("%q is said twice", clause))
		}
		seen[clause] = true
	}
	return faults
}
