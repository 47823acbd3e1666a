// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// kubeVirtObjects reads the objects of KubeVirt and CDI that users apply: the examples, and the overlay's profiles.
func kubeVirtObjects(t *testing.T) (all []map[string]any) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, examples, "kubevirt/*.yaml"))
	if err != nil || len(files) != 5 {
		t.Fatalf("expected 5 examples, found %v: %v", files, err)
	}
	for _, file := range append(files, filepath.Join(root, "deploy/kubernetes/overlays/kubevirt/storageprofiles.yaml")) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for doc := range strings.SplitSeq(string(text), "\n---\n") {
			var o map[string]any
			if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if strings.Contains(o["apiVersion"].(string), "kubevirt.io/") {
				all = append(all, o)
			}
		}
	}
	return all
}

// fault is an object with one thing wrong.
type fault struct {
	what   string // where, and what
	object map[string]any
}

// faultsOf makes copies of an object, each with one field misspelt or of a wrong type.
func faultsOf(t *testing.T, o map[string]any) (all []fault) {
	t.Helper()
	walk(o, o["kind"].(string), func(in map[string]any, field, path string) {
		value := in[field]
		note := func(what string) {
			all = append(all, fault{path + " " + what, copied(t, o)})
		}
		delete(in, field)
		in[field+"x"] = value
		note("is misspelt")
		delete(in, field+"x")
		in[field] = []any{}
		if _, list := value.([]any); list {
			in[field] = "no list"
		}
		note("has a wrong type")
		in[field] = value
	})
	return all
}

// walk visits all fields of an object's spec, and of its templates'. What users name themselves is no field.
func walk(o map[string]any, path string, visit func(in map[string]any, field, path string)) {
	for _, field := range slices.Sorted(maps.Keys(o)) {
		if slices.Contains([]string{"apiVersion", "kind", "metadata"}, field) && !strings.Contains(path, ".") {
			continue
		}
		at := path + "." + field
		visit(o, field, at)
		switch value := o[field].(type) {
		case map[string]any:
			if field != "requests" {
				walk(value, at, visit)
			}
		case []any:
			for _, item := range value {
				if in, ok := item.(map[string]any); ok {
					walk(in, at+"[]", visit)
				}
			}
		}
	}
}

func copied(t *testing.T, o map[string]any) (other map[string]any) {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	decode(t, string(b), &other)
	return other
}

// TestKubeVirtSchemas has the API server refuse each field of our objects when it is misspelt or has a wrong type, and
// accept what docs/kubevirt.md tells users to write.
func TestKubeVirtSchemas(t *testing.T) {
	withKubeVirtCRDs(t)
	faults := map[string]string{} // by the name of the object
	seen := map[string]bool{}
	var manifest strings.Builder
	for _, o := range kubeVirtObjects(t) {
		for _, f := range faultsOf(t, o) {
			if seen[f.what] {
				continue
			}
			seen[f.what] = true
			name := fmt.Sprintf("fault-%d", len(faults))
			faults[name] = f.what
			f.object["metadata"] = map[string]any{"name": name}
			b, err := json.Marshal(f.object)
			if err != nil {
				t.Fatal(err)
			}
			manifest.Write(append(b, "\n---\n"...))
		}
	}
	if len(faults) < 80 {
		t.Errorf("tried %d faults, which cannot be all: %v", len(faults), slices.Sorted(maps.Values(faults)))
	}
	out, err := cluster(manifest.String(), "kubectl", "create", "--dry-run=server", "--validate=strict", "-f", "-")
	for _, accepted := range regexp.MustCompile(`(fault-\d+) created`).FindAllStringSubmatch(out, -1) {
		t.Errorf("accepted: %s", faults[accepted[1]])
	}
	said := fmt.Sprint(err)
	unknown, wrong := strings.Count(said, "strict decoding error: unknown field "), strings.Count(said, "is invalid: ")
	if unknown != wrong || unknown+wrong != len(faults) {
		t.Errorf("of %d faults, half are misspelt: %d unknown fields, %d of a wrong type: %s", len(faults), unknown, wrong, said)
	}
	testDocumentedSettings(t)
}

// testDocumentedSettings has the API server validate what docs/kubevirt.md says in its text.
func testDocumentedSettings(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(root, kubeVirtDoc))
	if err != nil {
		t.Fatal(err)
	}
	said := func(setting string) string {
		t.Helper()
		if !strings.Contains(string(doc), setting) {
			t.Errorf("%s does not say %q", kubeVirtDoc, setting)
		}
		return setting
	}
	vm := example(t, "kubevirt/block.yaml")
	for _, setting := range []string{"blockSize: {matchVolume: {}}", "blockSize: {custom: {logical: 512, physical: 4096}}"} {
		validate(t, replace(t, vm, "{name: root, disk", "{name: root, "+said(setting)+", disk"))
	}
	validate(t, replace(t, vm, "      domain:", "      "+said("evictionStrategy: None")+"\n      domain:"))
	validate(t, "{apiVersion: cdi.kubevirt.io/v1beta1, kind: CDI, metadata: {name: cdi}, spec: {config: {"+
		said(`filesystemOverhead: {storageClass: {disktemplate-vm-image: "0"}}`)+"}}}")
	said("vmStateStorageClass")
	validate(t, "{apiVersion: kubevirt.io/v1, kind: KubeVirt, metadata: {name: kubevirt}, spec: {configuration: {vmStateStorageClass: disktemplate-vm}}}")

	apply(t, "{apiVersion: cdi.kubevirt.io/v1beta1, kind: CDI, metadata: {name: cdi}, spec: {}}")
	line := regexp.MustCompile(`kubectl (patch cdi .*)`).FindStringSubmatch(string(doc))
	if line == nil {
		t.Fatalf("%s does not say how scratch space gets a class", kubeVirtDoc)
	}
	on(t, "sh", "-c", filepath.Join(stateDir(), "bin/kubectl")+" "+line[1])
	if got := get(t, "cdi cdi", ".spec.config.scratchSpaceStorageClass"); got != "disktemplate-ext4" {
		t.Errorf("after `%s` the class of scratch space is %q", line[0], got)
	}
}

const kubeVirtDoc = "docs/kubevirt.md"
