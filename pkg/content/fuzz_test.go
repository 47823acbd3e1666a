// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"testing"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
)

// FuzzParse reads lists. What is accepted can be used, once. What is refused is said briefly.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "contents:\n- {name: a, tar: a.tar, namespaces: [ci], size: 1Gi, owner: \"1:2\", mode: \"0700\", fsGroup: 3}\n",
		"contents:\n- name: b\n  oci: quay.io/a/b:1\n  namespaces: ['*']\n- 5\n- {name: c, disk: \"oci://[::1]:5/a@" + sha + "\"}\n",
		`{"contents": [{"name": "a", "name": "b"}]}`, "contents: &a [*a, <<: *b]", "a: b: c", "contents:\n- {<<: {name: a}, tar: !!binary aGk=}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		contents, bad, err := format.Parse(content)
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
		for _, c := range contents {
			if len(validation.IsDNS1123Label(c.Name)) > 0 || seen[c.Name] || len(c.Namespaces) == 0 || (c.File == "") == (c.Reference == "") ||
				c.Size < 0 || c.Kind != Tar && c.Kind != Disk || c.Kind == Disk && c.Options != (Options{}) {
				t.Errorf("accepted %+v", c)
			}
			seen[c.Name] = true
		}
	})
}
