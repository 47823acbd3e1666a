// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestValues gives values that stand for no component, and looks for what each is to change. An entry that begins with
// "!" must not be there.
func TestValues(t *testing.T) {
	const plugin, claims = "DaemonSet csi-disktemplate plugin", "DaemonSet csi-disktemplate claims"
	for text, c := range map[string]struct {
		object string
		says   []string
	}{
		"": {plugin,
			[]string{"image: ghcr.io/csi-disktemplate/csi-disktemplate", "!imagePull"}},
		"image: {tag: '1.0'}":        {plugin, []string{"csi-disktemplate:1.0\n", `app.kubernetes.io/version: "1.0"`}},
		"image: {repository: r:5/x}": {plugin, []string{"image: r:5/x:v"}},
		"image: {pullPolicy: Never, pullSecrets: [{name: s}]}": {plugin,
			[]string{"imagePullPolicy: Never\n", "imagePullSecrets:\n      - name: s\n"}},
		"image: {pullSecrets: [{name: s2}]}": {claims, []string{"imagePullSecrets:\n      - name: s2\n"}},
		"pool: {path: /data/p}":              {plugin, []string{"path: /data/p\n          type: DirectoryOrCreate\n"}},
		"pool: {loopbackSize: 100Gi, maxClaims: 300}": {plugin,
			[]string{"- --loopback-pool-size=100Gi\n", "- --max-volumes-per-node=300\n"}},
		"pool: {loopbackSize: ''}": {plugin, []string{"type: Directory\n", "!--loopback", "!--max-volumes"}},
		"pool: {headroom: 10%, nodeHeadroom: 30Gi, overcommit: 1.5}": {plugin,
			[]string{"- --headroom=10%\n", "- --node-headroom=30Gi\n", "- --overcommit=1.5\n"}},
		"nodes: {selector: {example.org/disk: 'true'}}": {plugin,
			[]string{"example.org/disk: \"true\"\n", "kubernetes.io/os: linux"}},
		"nodes: {selector: {disk: fast}}": {claims, []string{"disk: fast\n"}},
		"nodes: {tolerations: []}":        {plugin, []string{"tolerations: []\n"}},
		"nodes: {tolerations: [{key: a, operator: Exists}]}": {claims,
			[]string{"tolerations:\n      - key: a\n        operator: Exists\n", "!effect"}},
		"extraArgs: [--max-inline-size=200Gi, -v=4]": {plugin, []string{"- --max-inline-size=200Gi\n        - -v=4\n"}},
		"resources: {limits: {memory: 2Gi}}": {plugin,
			[]string{"resources:\n          limits:\n            memory: 2Gi\n", "!64Mi"}},
		"sidecars: {registry: mirror.example.org/k}": {claims,
			[]string{"image: mirror.example.org/k/csi-provisioner:v", "image: mirror.example.org/k/csi-resizer:v"}},
		"sidecars: {resources: {requests: {cpu: 99m}}}":       {claims, []string{"cpu: 99m", "!10m"}},
		"prewarm: {enabled: true, wait: true, templates: []}": {plugin, []string{"- --wait-for-prewarm\n"}},
		"prewarm: {enabled: true, templates: ['xfs:10Gi', 'ext4:1Gi']}": {"ConfigMap csi-disktemplate prewarm",
			[]string{"templates: |-\n    xfs:10Gi\n    ext4:1Gi\n"}},
		"contents: {enabled: true, list: [{name: pg, tar: pg.tar.zst, namespaces: [ci]}]}": {
			"ConfigMap csi-disktemplate csi-disktemplate-contents", []string{"    contents:\n    - name: pg\n      namespaces:\n"}},
		"contents: {enabled: true, directory: /data/c}": {plugin, []string{"path: /data/c\n", "memory: 5Gi\n"}},
		"goldens: {enabled: true}": {"ConfigMap csi-disktemplate csi-disktemplate-goldens",
			[]string{"goldens: []\n"}},
		"goldens: {enabled: true, shared: [{name: go, readers: ['*'], writers: [ci]}]}": {
			"ConfigMap csi-disktemplate csi-disktemplate-goldens", []string{"    - name: go\n      readers:\n      - '*'\n"}},
		"monitors: {enabled: true, labels: {release: prom}}": {"PodMonitor csi-disktemplate plugin", []string{"release: prom\n"}},
		"claims: {moreStorageClasses: [{name: big, reclaimPolicy: Retain, parameters: {format: xfs}}]}": {
			"StorageClass <nil> big", []string{"reclaimPolicy: Retain\n", "format: xfs\n", "component: claims\n"}},
	} {
		o, ok := helm(t, text)[c.object]
		if !ok {
			t.Errorf("with %s there is no %s", text, c.object)
			continue
		}
		b, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		for _, says := range c.says {
			if word, not := strings.CutPrefix(says, "!"); strings.Contains(string(b), word) == not {
				t.Errorf("with %s, %q is in %s: %v\n%s", text, word, c.object, not, b)
			}
		}
	}
}

// TestStorageClasses checks that only the classes that are asked for are made.
func TestStorageClasses(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                {"disktemplate-btrfs", "disktemplate-ext4", "disktemplate-xfs"},
		"claims: {storageClasses: [xfs]}": {"disktemplate-xfs"},
		"claims: {storageClasses: []}":    nil,
		"claims: {enabled: false}":        nil,
	} {
		var got []string
		for key := range helm(t, text) {
			if name, ok := strings.CutPrefix(key, "StorageClass <nil> "); ok {
				got = append(got, name)
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("with %q the classes are %v, want %v", text, got, want)
		}
	}
}

// TestRefused gives wrong values. Helm refuses them before it asks the cluster anything, and says where and why.
func TestRefused(t *testing.T) {
	for text, says := range map[string][]string{
		"pol: {}":                                              {"additional properties 'pol' not allowed"},
		"pool: {size: 20Gi}":                                   {"at '/pool'", "additional properties 'size' not allowed"},
		"pool: {loopbackSize: 20GB}":                           {"at '/pool/loopbackSize'", "'20GB' does not match pattern", "Gi"},
		"pool: {loopbackSize: 20}":                             {"at '/pool/loopbackSize'", "got number, want string"},
		"pool: {path: data}":                                   {"at '/pool/path'", "'data' does not match pattern '^(/"},
		"pool: {path: '/a b'}":                                 {"at '/pool/path'"},
		"pool: {overcommit: 0.5}":                              {"at '/pool/overcommit'", "minimum: got 0.5, want 1"},
		"pool: {headroom: lots}":                               {"at '/pool/headroom'", "'lots' does not match pattern"},
		"pool: null":                                           {"missing property 'pool'"},
		"pool: {maxClaims: -1}":                                {"at '/pool/maxClaims'", "minimum"},
		"kubeletDir: kubelet":                                  {"at '/kubeletDir'"},
		"claims: {storageClasses: [zfs]}":                      {"at '/claims/storageClasses/0'", "'btrfs', 'ext4', 'xfs'"},
		"snapshots: true":                                      {"at '/snapshots'", "got boolean, want object"},
		"snapshots: {enabled: 'yes'}":                          {"at '/snapshots/enabled'", "got string, want boolean"},
		"image: {pullPolicy: Sometimes}":                       {"at '/image/pullPolicy'", "'Always', 'IfNotPresent', 'Never'"},
		"prewarm: {templates: [zfs:1Gi]}":                      {"at '/prewarm/templates/0'"},
		"goldens: {shared: [{name: g, writers: ['*']}]}":       {"at '/goldens/shared/0/writers/0'"},
		"nodes: {tolerations: [{operator: Maybe}]}":            {"at '/nodes/tolerations/0/operator'"},
		"resources: {memory: 2Gi}":                             {"at '/resources'", "additional properties 'memory' not allowed"},
		"snapshots: {enabled: true}\nclaims: {enabled: false}": {"snapshots.enabled needs claims.enabled"},
		"kubevirt: {enabled: true}":                            {"kubevirt.enabled needs snapshots.enabled"},
		"extraArgs: [max-inline-size]":                         {`extraArgs: "max-inline-size" is no flag; write --NAME=VALUE`},
	} {
		_, err := render(namespace, parseValues(t, text))
		if err == nil {
			t.Errorf("accepted: %s", text)
			continue
		}
		for _, word := range says {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: does not say %q: %v", text, word, err)
			}
		}
	}
	for _, in := range []string{"default", "kube-system"} {
		if _, err := render(in, nil); err == nil || !strings.Contains(err.Error(), "a namespace of its own") {
			t.Errorf("in %s: %v", in, err)
		}
	}
}

// TestSchemaComplete checks that values.yaml and its schema have the same names, and that the schema takes no others.
func TestSchemaComplete(t *testing.T) {
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(root, chartDir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var schema struct{ node }
	if err := json.Unmarshal(read("values.schema.json"), &schema); err != nil {
		t.Fatal(err)
	}
	delete(schema.Properties, "global")
	schema.compare(t, "", parseValues(t, string(read("values.yaml"))), schema.Definitions)
}

// node is what TestSchemaComplete reads of a schema.
type node struct {
	Ref                  string `json:"$ref"`
	Properties           map[string]node
	AdditionalProperties any
	Definitions          map[string]node
}

func (n node) compare(t *testing.T, at string, v values, definitions map[string]node) {
	t.Helper()
	have, want := slices.Sorted(maps.Keys(n.Properties)), slices.Sorted(maps.Keys(v))
	if !slices.Equal(have, want) || n.AdditionalProperties != false {
		t.Errorf("%s/: the schema has %v, and values.yaml %v", at, have, want)
	}
	for key, child := range n.Properties {
		if name, ok := strings.CutPrefix(child.Ref, "#/definitions/"); ok {
			child = definitions[name]
		}
		if inner, ok := v[key].(map[string]any); ok && len(inner) > 0 {
			child.compare(t, at+"/"+key, inner, definitions)
		}
	}
}

// TestNotes checks that the notes say what to do next, and which ConfigMaps are the user's.
func TestNotes(t *testing.T) {
	for text, says := range map[string][]string{
		"": {"in the namespace csi-disktemplate", "csi.disktemplate.io/plugin=true", "examples/inline.yaml",
			"3. Claims", "!is yours to make", "!pod-security"},
		"claims: {enabled: false}":                  {"!3. Claims"},
		"nodes: {chosenOnly: true}":                 {"only on nodes that you choose"},
		"prewarm: {enabled: true, templates: null}": {`The ConfigMap "prewarm" is yours to make.`},
		"goldens: {enabled: true, shared: null}":    {`The ConfigMap "csi-disktemplate-goldens" is yours to make.`},
		"contents: {enabled: true, list: null}":     {`The ConfigMap "csi-disktemplate-contents" is yours to make.`},
	} {
		files, err := render(namespace, parseValues(t, text))
		if err != nil {
			t.Fatal(err)
		}
		notes := files["csi-disktemplate/templates/NOTES.txt"]
		for _, says := range says {
			if word, not := strings.CutPrefix(says, "!"); strings.Contains(notes, word) == not {
				t.Errorf("with %s, %q is in the notes: %v\n%s", text, word, not, notes)
			}
		}
	}
}
