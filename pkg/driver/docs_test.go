// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// documented compares what stands between two lines of a document with what it must be. With UPDATE=1 in the
// environment it writes it.
func documented(t *testing.T, doc, what, want string) {
	t.Helper()
	begin := fmt.Sprintf("<!-- Written by UPDATE=1 go test -run %s ./pkg/driver -->\n", t.Name())
	end := fmt.Sprintf("<!-- End of the %s. -->\n", what)
	path := "../../docs/" + doc
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, began := strings.Cut(string(b), begin)
	has, after, ended := strings.Cut(rest, end)
	if !began || !ended {
		t.Fatalf("%s lacks the lines around the %s", doc, what)
	}
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(path, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if has != want {
		t.Errorf("%s does not have the %s as they are; run the line that stands in it\n%s", doc, what, want)
	}
}

// TestSettingsAreDocumented compares the tables of attributes and parameters with those of the code.
func TestSettingsAreDocumented(t *testing.T) {
	var ofInline, ofClass []setting
	for _, a := range attributes {
		ofInline = append(ofInline, a.setting)
	}
	for _, p := range classParameters {
		ofClass = append(ofClass, p.setting)
	}
	documented(t, "inline-volumes.md", "attributes", settingsTable("attribute", ofInline))
	documented(t, "claims.md", "parameters", settingsTable("parameter", ofClass))
}

// settingsTable is a table in Markdown.
func settingsTable(kind string, settings []setting) string {
	var table strings.Builder
	fmt.Fprintf(&table, "\n| %s | values | default | is |\n|---|---|---|---|\n", kind)
	for _, s := range settings {
		fmt.Fprintf(&table, "| `%s` | %s | %s | %s |\n", s.name, s.values, s.byDefault, s.meaning)
	}
	return table.String() + "\n"
}

// TestSettingsAreDescribed: each has all its words, and its values are those that are accepted.
func TestSettingsAreDescribed(t *testing.T) {
	for _, a := range attributes {
		describes(t, a.setting, func(value string) error {
			given := map[string]string{a.name: value}
			switch a.name { // these need another one beside them
			case attrOrElse:
				given[attrFrom] = "golden/x"
			case attrCommitWhen:
				given[attrCommitTo] = "x"
			}
			_, err := inlineRequest(inline("", flat(given)...))
			return err
		})
	}
	for _, p := range classParameters {
		describes(t, p.setting, func(value string) error {
			var c class
			return p.read(&c, value)
		})
	}
}

// describes checks the words of a setting. Values in backquotes that have no capitals are given as they are.
func describes(t *testing.T, s setting, give func(value string) error) {
	t.Helper()
	if s.values == "" || s.byDefault == "" || s.meaning == "" {
		t.Errorf("%s has no words: %+v", s.name, s)
	}
	if !strings.HasPrefix(s.values, "`") {
		return
	}
	list, _, _ := strings.Cut(s.values, ";")
	for value := range strings.SplitSeq(list, ", ") {
		value = strings.Trim(value, "`")
		if strings.Contains(value, "=") {
			continue
		}
		if err := give(strings.ReplaceAll(value, "NAME", "name")); err != nil {
			t.Errorf("%s is said to take %s: %v", s.name, value, err)
		}
	}
}

// flat is a map as a list of keys, each with its value after it.
func flat(m map[string]string) (list []string) {
	for key, value := range m {
		list = append(list, key, value)
	}
	return list
}
