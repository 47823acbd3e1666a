// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestGenerate changes one thing in the manifests. The chart follows, or the generator says what it cannot follow:
// nothing is left out unseen.
func TestGenerate(t *testing.T) {
	const (
		plugin   = "base/plugin.yaml"
		loopback = "components/loopback/kustomization.yaml"
		contents = "components/contents/kustomization.yaml"
		k0s      = "components/k0s/kustomization.yaml"
	)
	for _, c := range []struct{ file, old, new, template, says string }{
		{plugin, "--shared-resizer", "--shared-resizer # new", "plugin.yaml", "- --shared-resizer # new\n"},
		{plugin, "memory: 1536Mi", "memory: 2Gi", "plugin.yaml", "{{ if .Values.contents.enabled }}5Gi{{ else }}2Gi{{ end }}"},
		{contents, "--content-dir=/", "--contents-in=/", "plugin.yaml", "- --contents-in=/var/lib/csi-disktemplate-contents\n"},
		{contents, "value: 5Gi", "value: 6Gi", "plugin.yaml", "{{ if .Values.contents.enabled }}6Gi{{ else }}"},
		{"base/kustomization.yaml", "part-of: csi-disktemplate", "part-of: x", "csidriver.yaml", "/part-of: x\n"},
		{loopback, "20Gi\n", "40Gi\n", "", `no patch has "=20Gi" any more; see parts in plan.go`},
		{loopback, "kind: Component", "kind: Component\nimages: []", "", "field images not found"},
		{loopback, "name: plugin}", "name: plug}", "", "nothing is named ^(?:plug)$"},
		{loopback, "op: add", "op: remove", "", "this step has no form in the chart"},
		{contents, "limits/memory", "limit/memory", "", "replace /spec/template/spec/containers/0/resources/limit/memory"},
		{k0s, "value: KUBELET_DIR", "value: OTHER", "", "test /spec/template/spec/containers/0/env/1/name"},
		{"components/claims/sidecars.yaml", sidecarRegistry + "csi-resizer", "x/csi-resizer", "", "is not from registry.k8s.io"},
		{plugin, "{path: /var/lib/csi-disktemplate, type", "{file: /x, type", "", "has no /spec/template/spec/volumes/1/hostPath"},
	} {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, manifests))); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), c.old) {
			t.Errorf("%s has no %q", c.file, c.old)
		}
		changed := strings.ReplaceAll(string(b), c.old, c.new)
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(changed), 0o644); err != nil {
			t.Fatal(err)
		}
		files, err := generate(dir)
		switch {
		case c.template == "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s with %q: %v, want an error that says %q", c.file, c.new, err, c.says)
		case c.template != "" && (err != nil || !strings.Contains(files[c.template], c.says)):
			t.Errorf("%s with %q: %v, and %s does not say %q", c.file, c.new, err, c.template, c.says)
		}
	}
}
