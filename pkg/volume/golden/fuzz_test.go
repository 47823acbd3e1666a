// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"path/filepath"
	"slices"
	"testing"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// FuzzSharing reads lists of shared goldens. Nobody unnamed may write to what is accepted. What is refused is said
// briefly.
func FuzzSharing(f *testing.F) {
	for _, s := range []string{
		"", "goldens:\n- name: go\n  readers: ['*']\n  writers: [ci-main]\n- 5\n- {name: b, writers: ['*']}\n",
		`{"goldens": [{"name": "a", "name": "b"}]}`,
		"goldens: &a [*a, <<: *b]", "goldens:\n- {<<: {name: a}, readers: !!binary aGk=}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		list, bad, err := sharedFormat.Parse(content)
		var texts []string
		if err != nil {
			texts = append(texts, err.Error())
		}
		for _, b := range bad {
			texts = append(texts, b.Entry+": "+b.Err.Error())
		}
		for _, text := range texts {
			if !utf8.ValidString(text) || len(text) > 700 {
				t.Errorf("%.800q", text)
			}
			for _, fault := range plain.Faults(text) {
				t.Errorf("%s: %s", fault, text)
			}
		}
		seen := map[string]bool{}
		for _, g := range list {
			notNamed := func(n string) bool { return len(validation.IsDNS1123Label(n)) > 0 }
			if notNamed(g.name) || seen[g.name] || len(g.readers)+len(g.writers) == 0 || slices.ContainsFunc(g.writers, notNamed) {
				t.Errorf("accepted %+v", g)
			}
			seen[g.name] = true
		}
	})
}

// FuzzNames reads names of goldens and of files. What is accepted is written as it was read.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"ci/go@1", "go", "go@2", "ci.go.1", "_.go.12", "ci.go.01", "ci/go@", "a/b/c", "_/go"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		g, err := ParseGeneration(text)
		if err != nil {
			if len(err.Error()) > 900 || len(plain.Faults(err.Error())) > 0 {
				t.Errorf("%q: %v", plain.Faults(err.Error()), err)
			}
		} else if written := g.String(); written != text && (g.Number != 0 || g.Name.String() != text) {
			t.Errorf("%q is written %q", text, written)
		}
		if g, ok := ofFile(text); ok && (g.file() != text || g.Number < 1 || filepath.Base(text) != text) {
			t.Errorf("the file %q is of %s, which has %q", text, g, g.file())
		}
	})
}

// FuzzLineage reads what pods write. What is accepted names goldens of their own namespace, and shared ones.
func FuzzLineage(f *testing.F) {
	f.Add("golden/go", "shared/go,content/go", "shared/go", "always")
	f.Add("shared/go", "", "go", "")
	f.Add("golden/../x", "content/a,golden/b", "other/go", "Always")
	f.Fuzz(func(t *testing.T, from, orElse, to, when string) {
		l := image.Lineage{From: from, OrElse: orElse, CommitTo: to, CommitWhen: image.CommitWhen(when)}
		sources, sourcesErr := Sources(l, field)
		target, targetErr := Target(l, field)
		for _, err := range []error{sourcesErr, targetErr} {
			if err != nil && (len(err.Error()) > 900 || len(plain.Faults(err.Error())) > 0) {
				t.Errorf("%q: %v", plain.Faults(err.Error()), err)
			}
		}
		if targetErr == nil && target != (Source{}) {
			sources = append(sources, target)
		}
		for _, s := range sources {
			g := s.Golden("ci")
			if again, err := ParseName(g.String()); err != nil || again != g || g.Namespace != "ci" && s.Kind != Shared {
				t.Errorf("%+v is %s: %v", s, g, err)
			}
		}
	})
}
