// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"fmt"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedlist"
)

const sha = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParse(t *testing.T) {
	contents, bad, err := format.Parse([]byte(`# what the shop uses
contents:
- name: postgres-16
  tar: postgres-16.tar.zst
  namespaces: [ci, staging]
  size: 2Gi
  owner: "999:998"
  mode: "2750"
  fsGroup: 999
- {name: modules, oci: "registry.example.com:5000/ci/node-modules:latest", namespaces: ["*"], size: 1048576}
- {name: fixed, oci: "localhost/a@` + sha + `", namespaces: [ci]}
- {name: fedora, disk: fedora-42.qcow2, namespaces: [vms]}
- {name: cirros, disk: "oci://quay.io/containerdisks/cirros:1", namespaces: [vms]}
`))
	if err != nil || len(bad) > 0 {
		t.Fatal(err, bad)
	}
	var got strings.Builder
	for _, c := range contents {
		fmt.Fprintln(&got, c.Name, c.Kind, c.File, c.Reference, c.Namespaces, c.Size)
	}
	want := `postgres-16 tar postgres-16.tar.zst  [ci staging] 2147483648
modules tar  registry.example.com:5000/ci/node-modules:latest [*] 1048576
fixed tar  localhost/a@` + sha + ` [ci] 0
fedora disk fedora-42.qcow2  [vms] 0
cirros disk  quay.io/containerdisks/cirros:1 [vms] 0
`
	if got.String() != want {
		t.Errorf("read\n%swant\n%s", got.String(), want)
	}
	o := contents[0].Options
	if *o.UID != 999 || *o.GID != 998 || *o.Mode != 0o2750 || *o.FSGroup != 999 || contents[1].Options != (Options{}) {
		t.Errorf("options are %+v", o)
	}
	for _, nothing := range []string{"", "# nothing", "contents:", "contents: []", "{}", "null"} {
		if contents, bad, err := format.Parse([]byte(nothing)); len(contents)+len(bad) > 0 || err != nil {
			t.Errorf("%q: %v %v %v", nothing, contents, bad, err)
		}
	}
}

// TestParseJSON: JSON is YAML too.
func TestParseJSON(t *testing.T) {
	contents, bad, err := format.Parse([]byte(`{"contents": [{"name": "a", "tar": "a.tar", "namespaces": ["*"], "fsGroup": 0}]}`))
	if len(contents) != 1 || len(bad) > 0 || err != nil || *contents[0].Options.FSGroup != 0 {
		t.Errorf("%v %v %v", contents, bad, err)
	}
}

// TestBadEntries checks what is said of each, and that it leaves its neighbours alone.
func TestBadEntries(t *testing.T) {
	const good = "- {name: good, tar: good.tar, namespaces: [ci]}\n"
	for entry, says := range map[string]string{
		`- just text`:                                                  "entry 2: must be a map",
		`-`:                                                            "entry 2: must be a map",
		`- {tar: a.tar, namespaces: [ci]}`:                             "entry 2: name is missing",
		`- {name: a, tar: a.tar}`:                                      "entry 2 (a): namespaces is missing",
		`- {name: a, namespaces: [ci]}`:                                "entry 2 (a): it has 0 of tar, oci, disk, and must have one",
		`- {name: A_b, tar: a}`:                                        `name "A_b": must be 1 to 63 lower-case letters`,
		`- {name: 1, tar: a}`:                                          "name 1: must be 1 to 63 lower-case letters, digits and '-', not at either end, in quotes",
		`- {name: ` + strings.Repeat("a", 64) + `}`:                    "must be 1 to 63",
		`- {name: a, tar: x, disk: z, namespaces: [ci]}`:               "it has 2 of tar, oci, disk",
		`- {name: a, tar: x, namespace: [ci]}`:                         `(a): the field "namespace" is unknown; there are disk, fsGroup, mode, name`,
		`- {name: a, tar: x, namespaces: ci}`:                          `namespaces "ci": must be a list of namespaces`,
		`- {name: a, tar: x, namespaces: []}`:                          `namespaces (a list): must be a list`,
		`- {name: a, tar: x, namespaces: [ci, "c*"]}`:                  `"c*" is no namespace`,
		`- {name: a, tar: x, namespaces: [5]}`:                         `5 is no namespace`,
		`- {name: a, tar: ../x, namespaces: [ci]}`:                     `tar "../x": must be the name of a file in the directory of contents`,
		`- {name: a, tar: sub/x, namespaces: [ci]}`:                    `tar "sub/x": must be the name`,
		`- {name: a, tar: .x, namespaces: [ci]}`:                       `tar ".x": must be the name`,
		`- {name: a, tar: {}, namespaces: [ci]}`:                       `tar (a map): must be the name`,
		`- {name: a, tar: "", namespaces: [ci]}`:                       `tar "": must be the name`,
		`- {name: a, oci: alpine, namespaces: [ci]}`:                   `oci "alpine": must be REGISTRY/REPOSITORY:TAG`,
		`- {name: a, oci: library/alpine:3, namespaces: [ci]}`:         `oci "library/alpine:3": must be REGISTRY`,
		`- {name: a, oci: quay.io/a/b, namespaces: [ci]}`:              "must be REGISTRY/REPOSITORY:TAG",
		`- {name: a, oci: "https://quay.io/a/b:1", namespaces: [ci]}`:  "must be REGISTRY/REPOSITORY:TAG",
		`- {name: a, oci: "quay.io/a@sha256:12", namespaces: [ci]}`:    "must be REGISTRY/REPOSITORY:TAG",
		`- {name: a, oci: "quay.io/../a:1", namespaces: [ci]}`:         "must be REGISTRY/REPOSITORY:TAG",
		`- {name: a, disk: "oci://fedora", namespaces: [ci]}`:          `disk "oci://fedora": must be REGISTRY`,
		`- {name: a, disk: x, namespaces: [ci], mode: "0700"}`:         "mode is of a root directory, and a disk has none",
		`- {name: a, disk: x, namespaces: [ci], fsGroup: 1}`:           "fsGroup is of a root directory",
		`- {name: a, tar: x, namespaces: [ci], size: 10GB}`:            `size "10GB": invalid size: must be a quantity`,
		`- {name: a, tar: x, namespaces: [ci], size: -1}`:              `size -1: must be more than 0`,
		`- {name: a, tar: x, namespaces: [ci], size: [1]}`:             `size (a list): must be a quantity`,
		`- {name: a, tar: x, namespaces: [ci], owner: 610}`:            `owner 610: must be "UID:GID", two numbers from 0 to 4294967294, in quotes`,
		`- {name: a, tar: x, namespaces: [ci], owner: "root:root"}`:    `owner "root:root": must be "UID:GID"`,
		`- {name: a, tar: x, namespaces: [ci], owner: "1:4294967295"}`: `must be "UID:GID"`,
		`- {name: a, tar: x, namespaces: [ci], owner: "1"}`:            `must be "UID:GID"`,
		`- {name: a, tar: x, namespaces: [ci], mode: 0700}`:            `mode 448: must be permission bits as chmod(1) has them, from "0000" to "7777", in quotes`,
		`- {name: a, tar: x, namespaces: [ci], mode: "0o700"}`:         `mode "0o700": must be permission bits`,
		`- {name: a, tar: x, namespaces: [ci], mode: "17777"}`:         `mode "17777": must be permission bits`,
		`- {name: a, tar: x, namespaces: [ci], mode: }`:                `mode (empty): must be permission bits`,
		`- {name: a, tar: x, namespaces: [ci], fsGroup: -1}`:           `fsGroup -1: must be a number from 0 to 2147483647`,
		`- {name: a, tar: x, namespaces: [ci], fsGroup: "1"}`:          `fsGroup "1": must be a number`,
		`- {name: a, tar: x, namespaces: [ci], fsGroup: 1.5}`:          `fsGroup 1.5: must be a number`,
		`- {name: good, tar: x, namespaces: [ci]}`:                     "entry 2 (good): another entry before it has the same name",
	} {
		contents, bad, err := format.Parse([]byte("contents:\n" + good + entry + "\n" + strings.ReplaceAll(good, "name: good", "name: better")))
		if err != nil || len(contents) != 2 || contents[1].Name != "better" || len(bad) != 1 {
			t.Errorf("%s: %v %v %v", entry, contents, bad, err)
			continue
		}
		text := bad[0].Entry + ": " + bad[0].Err.Error()
		if !strings.Contains(text, says) {
			t.Errorf("%s\nis told %s\nwant    %s", entry, text, says)
		}
		for _, fault := range plain.Faults(text) {
			t.Errorf("%s: %s", fault, text)
		}
	}
}

// TestBadFile checks what is said of a file that nothing can be read from.
func TestBadFile(t *testing.T) {
	for file, says := range map[string]string{
		"contents: [":                      `it is no valid YAML; the parser says "line 1: `,
		"contents:\n- name: a\n name: b\n": `it is no valid YAML; the parser says "line `,
		"contents: []\ncontents: []\n":     `line 2: key \"contents\" already set`,
		"contents:\n- {name: a, name: b}":  `key \"name\" already set`,
		"- name: a":                        `it must be a map with the one key "contents"`,
		"content: []":                      `the key "content" is unknown`,
		"contents: 5":                      `"contents" must be a list`,
		"\x00\xff":                         "it is no",
		"a: &a [*a]":                       "it is no",
	} {
		contents, bad, err := format.Parse([]byte(file))
		if err == nil || len(contents)+len(bad) > 0 || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %s", file, err, says)
			continue
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Errorf("%s: %v", fault, err)
		}
	}
	var many strings.Builder
	many.WriteString("contents:\n")
	for i := range watchedlist.MaxEntries + 2 {
		fmt.Fprintf(&many, "- {name: c%d, tar: a, namespaces: [ci]}\n", i)
	}
	contents, bad, err := format.Parse([]byte(many.String()))
	if len(contents) != watchedlist.MaxEntries || len(bad) != 2 || err != nil || !strings.Contains(bad[0].Err.Error(), "list fewer") {
		t.Errorf("of %d contents %d count; bad are %v, %v", watchedlist.MaxEntries+2, len(contents), bad, err)
	}
}

func TestPin(t *testing.T) {
	for reference, want := range map[string]string{
		"quay.io/a/b:1":                "quay.io/a/b@" + sha,
		"quay.io:5000/a/b:1@sha256:00": "quay.io:5000/a/b@" + sha,
		"quay.io:5000/a/b@sha256:00":   "quay.io:5000/a/b@" + sha,
		"[::1]:5000/a:1":               "[::1]:5000/a@" + sha,
	} {
		if got := pin(reference, sha); got != want {
			t.Errorf("%s becomes %s, want %s", reference, got, want)
		}
	}
}
