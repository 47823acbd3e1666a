// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package watchedlist

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The lists of contents and of shared goldens have tests of what is said of files and entries.

type thing struct{ name string }

var things = Format[thing]{
	Key: "things", What: "things", Has: "name",
	Name:     func(t *thing) *string { return &t.name },
	Complete: func(*thing, map[string]any) error { return nil },
}

// TestOneBadAfterTheOther shows some of many entries that are wrong.
func TestOneBadAfterTheOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "things")
	content := "things:\n- name: good\n" + strings.Repeat("- {}\n", maxShown+5)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	l := Open(path, things)
	objects := map[string]bool{}
	for _, c := range l.Conditions("Code") {
		objects[c.Object] = true
	}
	if len(objects) != maxShown || len(l.All()) != 1 {
		t.Errorf("shows %v of %v", objects, l.All())
	}
}

// TestNoFile has neither entries nor conditions.
func TestNoFile(t *testing.T) {
	l := Open("", things)
	ok, instead := l.May("a", func(thing) bool { return true })
	if ok || instead != "none" || len(l.All())+len(l.Conditions("Code")) > 0 {
		t.Errorf("%v %q %v %v", ok, instead, l.All(), l.Conditions("Code"))
	}
}

func TestAllow(t *testing.T) {
	for _, test := range []struct {
		namespaces Namespaces
		namespace  string
		want       bool
	}{
		{Namespaces{"a", "b"}, "b", true},
		{Namespaces{"a", "b"}, "c", false},
		{Namespaces{"a"}, "", false},
		{Namespaces{""}, "", false},
		{Namespaces{"a", Everybody}, "c", true},
		{Namespaces{Everybody}, "", true},
		{nil, "a", false},
	} {
		if got := test.namespaces.Allow(test.namespace); got != test.want {
			t.Errorf("%q allow %q: %v", test.namespaces, test.namespace, got)
		}
	}
}
