// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCleanAllLine checks the line that messages about a full pool recommend.
func TestCleanAllLine(t *testing.T) {
	here, err := filepath.Abs("pool")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ namespace, pod, dir, want string }{
		{"", "", defaultPool, "csi-disktemplate clean-all"},
		{"", "", defaultPool + "/", "csi-disktemplate clean-all"},
		{"", "", "pool", "csi-disktemplate clean-all --pool " + here},
		{"", "plugin-x", "/mnt/pool", "csi-disktemplate clean-all --pool /mnt/pool"},
		{"csi", "plugin-x", defaultPool, "kubectl -n csi exec plugin-x -c plugin -- csi-disktemplate clean-all"},
		{"csi", "plugin-x", "/pool", "kubectl -n csi exec plugin-x -c plugin -- csi-disktemplate clean-all --pool /pool"},
	} {
		if got := cleanAllLine(c.namespace, c.pod, c.dir); got != c.want {
			t.Errorf("in pod %q of %q, with --pool %s: %q, want %q", c.pod, c.namespace, c.dir, got, c.want)
		}
	}
}

// TestManifestsFitLines checks what the kubectl lines take for granted of the manifests: the
// names and labels that they ask for, the variables that the plugin reads, and the pool that
// the commands have by default.
func TestManifestsFitLines(t *testing.T) {
	read := func(path string) string {
		b, err := os.ReadFile(filepath.Join("../../deploy", path))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	plugin := read("kubernetes/base/plugin.yaml")
	for _, want := range []string{
		"app.kubernetes.io/component: plugin", "- name: plugin\n",
		"- name: POD_NAME\n          valueFrom: {fieldRef: {fieldPath: metadata.name}}\n",
		"- name: POD_NAMESPACE\n          valueFrom: {fieldRef: {fieldPath: metadata.namespace}}\n",
		"- name: KUBELET_DIR\n",
		"- --pool=" + defaultPool + "\n", "mountPath: " + defaultPool + "}",
	} {
		if !strings.Contains(plugin, want) {
			t.Errorf("the plugin's manifest lacks %q", want)
		}
	}
	if !strings.Contains(read("kubernetes/base/kustomization.yaml"), "\nnamespace: csi-disktemplate\n") {
		t.Error("the manifests have another namespace")
	}
	if !strings.Contains(read("image/rootfs.sh"), `"$root/usr/bin/csi-disktemplate"`) {
		t.Error("the image has the binary where PATH does not reach it")
	}
}

// TestInPod checks the line that a command recommends which cannot open the pool.
func TestInPod(t *testing.T) {
	for want, args := range map[string][]string{
		"-- csi-disktemplate clean-all --dry-run --output=json":               {"clean-all", "--pool", "/x", "--dry-run", "-o", "json"},
		"-- csi-disktemplate golden rm shop/cache@3 go-modules":               {"golden", "rm", "shop/cache@3", "--pool", "/x", "go-modules"},
		"-- csi-disktemplate golden promote --snapshot=snapshot-1 shop/cache": {"golden", "promote", "--snapshot", "snapshot-1", "shop/cache"},
	} {
		cmd, rest, err := newCommand().Find(args)
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.ParseFlags(rest); err != nil {
			t.Fatal(err)
		}
		if got := inPod(cmd, "node1"); !strings.HasSuffix(got, want) || !strings.Contains(got, "spec.nodeName=node1)") {
			t.Errorf("%v: %q, want %q", args, got, want)
		}
	}
}
