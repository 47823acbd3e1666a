// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const root = "../.."

// TestWritten checks that the chart's templates are what the generator writes from the manifests.
func TestWritten(t *testing.T) {
	want, err := generate(filepath.Join(root, manifests))
	if err != nil {
		t.Fatal(err)
	}
	have, err := written(filepath.Join(root, chartDir, "templates"))
	if err != nil {
		t.Fatal(err)
	}
	for name := range maps.Keys(have) {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is of no manifest any more: run make chart", name)
		}
	}
	for name, text := range want {
		if have[name] != text {
			t.Errorf("%s differs from its manifest: run make chart\n%s", name, cmp.Diff(have[name], text))
		}
	}
}

// TestEveryDirectory checks that the chart has a part for each component and overlay, or a reason to have none.
func TestEveryDirectory(t *testing.T) {
	known := maps.Clone(left)
	for _, p := range parts {
		known[p.dir] = p.on
	}
	for _, kind := range []string{"components", "overlays"} {
		for _, dir := range directories(t, kind) {
			if _, ok := known[dir]; !ok {
				t.Errorf("%s is neither in parts nor in left", dir)
			}
			delete(known, dir)
		}
	}
	if delete(known, "base"); len(known) > 0 {
		t.Errorf("there are no %v", known)
	}
}

// directories lists the directories of deploy/kubernetes/KIND.
func directories(t *testing.T, kind string) (dirs []string) {
	t.Helper()
	all, err := os.ReadDir(filepath.Join(root, manifests, kind))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		dirs = append(dirs, kind+"/"+d.Name())
	}
	return dirs
}

// values are those of a user, as in a file that is given to helm install.
type values = map[string]any

func parseValues(t *testing.T, text string) (v values) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text), &v); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return v
}

// render has Helm render the chart. The keys are the names of templates.
func render(in string, v values) (map[string]string, error) {
	chart, err := loader.LoadDir(filepath.Join(root, chartDir))
	if err != nil {
		return nil, err
	}
	release := common.ReleaseOptions{Name: "r", Namespace: in, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, v, release, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(chart, all)
}

// objects are what a manifest contains, by kind, namespace and name.
type objects map[string]map[string]any

func (all objects) read(t *testing.T, text string) {
	t.Helper()
	for part := range strings.SplitSeq("\n"+text, "\n---") {
		var o map[string]any
		if err := yaml.UnmarshalStrict([]byte(part), &o); err != nil {
			t.Fatalf("%v in\n%s", err, part)
		}
		if o == nil {
			continue
		}
		metadata := o["metadata"].(map[string]any)
		key := fmt.Sprint(o["kind"], " ", metadata["namespace"], " ", metadata["name"])
		if all[key] != nil {
			t.Errorf("two objects are %s", key)
		}
		all[key] = o
	}
}

// helm returns what the chart installs.
func helm(t *testing.T, text string) objects {
	t.Helper()
	files, err := render(namespace, parseValues(t, text))
	if err != nil {
		t.Fatalf("%v for\n%s", err, text)
	}
	all := objects{}
	for name, text := range files {
		if strings.HasSuffix(name, ".yaml") {
			all.read(t, text)
		}
	}
	return all
}

// kustomize returns what a kustomization.yaml beside a clone of this repository installs, with the label that says
// who manages it set to what Helm writes.
func kustomize(t *testing.T, text string) objects {
	t.Helper()
	disk := filesys.MakeFsInMemory()
	err := filepath.WalkDir(filepath.Join(root, manifests), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil {
			name, _ := filepath.Rel(root, path)
			err = disk.WriteFile("/csi-disktemplate/"+name, b)
		}
		return err
	})
	if err == nil {
		err = disk.WriteFile("/mine/kustomization.yaml", []byte(text))
	}
	if err != nil {
		t.Fatal(err)
	}
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(disk, "/mine")
	if err != nil {
		t.Fatalf("%v for\n%s", err, text)
	}
	b, err := resources.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	const label = "app.kubernetes.io/managed-by: "
	all := objects{}
	all.read(t, strings.ReplaceAll(string(b), label+"kustomize\n", label+"Helm\n"))
	return all
}

// same compares what is installed by values with what is installed by a kustomization.yaml.
func same(t *testing.T, text, kustomization string) {
	t.Helper()
	got, want := helm(t, "namespace: {create: true}\n"+text), kustomize(t, kustomization)
	if len(want) < 5 {
		t.Errorf("kustomize makes only %d objects", len(want))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("kustomize (-) and the chart (+) differ for\n%s\nand\n%s\n%s", text, kustomization, diff)
	}
}

// TestOverlays compares each overlay with the values that mean the same.
func TestOverlays(t *testing.T) {
	const vmPool = "pool: {loopbackSize: 100Gi, maxClaims: 300, overcommit: 4}" // components/vm-pool
	meaning := map[string]string{
		"overlays/loopback":          "",
		"overlays/inline":            "claims: {enabled: false}",
		"overlays/snapshots":         "snapshots: {enabled: true}",
		"overlays/directory":         "pool: {path: /mnt/csi-disktemplate, loopbackSize: ''}",
		"overlays/kubevirt":          "snapshots: {enabled: true}\nkubevirt: {enabled: true}\n" + vmPool,
		"overlays/kubevirt-one-node": "snapshots: {enabled: true}\nkubevirt: {enabled: true, oneNode: true}\n" + vmPool,
		"overlays/k0s":               "kubeletDir: /var/lib/k0s/kubelet",
		"overlays/microk8s":          "kubeletDir: /var/snap/microk8s/common/var/lib/kubelet",
		"overlays/openshift":         "openshift: {enabled: true}",
	}
	for _, dir := range directories(t, "overlays") {
		v, ok := meaning[dir]
		if !ok {
			t.Errorf("no values mean %s", dir)
		}
		same(t, v, "resources: [../csi-disktemplate/deploy/kubernetes/"+dir+"]\n")
	}
	same(t, "", "resources: [../csi-disktemplate/deploy/kubernetes]\n")
}

// TestExamplesNameNoNamespace checks that users can apply each example in a namespace of their own: no object and no
// reference in it names one.
func TestExamplesNameNoNamespace(t *testing.T) {
	dir, found := filepath.Join(root, manifests, "examples"), 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".yaml" {
			return err
		}
		text, err := os.ReadFile(path)
		for doc := range strings.SplitSeq(string(text), "\n---\n") {
			found++
			if names := namespacesIn(parseValues(t, doc)); len(names) > 0 {
				t.Errorf("%s names the namespace %v", path, names)
			}
		}
		return err
	})
	if err != nil || found < 30 {
		t.Errorf("looked at %d objects: %v", found, err)
	}
}

// namespacesIn collects what fields of the name namespace have, anywhere in a value.
func namespacesIn(value any) (names []any) {
	switch value := value.(type) {
	case values:
		for field, v := range value {
			if field == "namespace" {
				names = append(names, v)
			}
			names = append(names, namespacesIn(v)...)
		}
	case []any:
		for _, v := range value {
			names = append(names, namespacesIn(v)...)
		}
	}
	return names
}

// TestStorageProfiles checks what CDI is told of each class: with several nodes it must not wait for a clone on another
// one.
func TestStorageProfiles(t *testing.T) {
	block := values{"accessModes": []any{"ReadWriteOnce"}, "volumeMode": "Block"}
	files := values{"accessModes": []any{"ReadWriteOnce"}, "volumeMode": "Filesystem"}
	sets := map[string]any{
		"vm": []any{block, files}, "vm-xfs": []any{block, files}, "vm-image": nil,
		"btrfs": []any{files}, "ext4": []any{files}, "xfs": []any{files},
	}
	for overlay, want := range map[string][2]string{"kubevirt": {"copy", "pvc"}, "kubevirt-one-node": {"snapshot", "snapshot"}} {
		all := kustomize(t, "resources: [../csi-disktemplate/deploy/kubernetes/overlays/"+overlay+"]\n")
		for class, modes := range sets {
			profile := all["StorageProfile <nil> disktemplate-"+class]
			if profile == nil || all["StorageClass <nil> disktemplate-"+class] == nil {
				t.Fatalf("%s: no class or no profile disktemplate-%s", overlay, class)
			}
			// KubeVirt shrinks a disk.img that is expanded.
			if got := all["StorageClass <nil> disktemplate-"+class]["allowVolumeExpansion"]; got != (class != "vm-image") {
				t.Errorf("%s: disktemplate-%s may be expanded: %v", overlay, class, got)
			}
			spec := profile["spec"].(values)
			if got := [2]string{spec["cloneStrategy"].(string), spec["dataImportCronSourceFormat"].(string)}; got != want {
				t.Errorf("%s: disktemplate-%s has %v, want %v", overlay, class, got, want)
			}
			if diff := cmp.Diff(modes, spec["claimPropertySets"]); diff != "" {
				t.Errorf("%s: disktemplate-%s: %s", overlay, class, diff)
			}
		}
	}
}

// TestPageStaysOnLoopback checks, for every overlay and component, that the plugin serves its page on an address of its
// pod's own network alone, and that no port or policy names it.
func TestPageStaysOnLoopback(t *testing.T) {
	seen := 0
	for _, dir := range append(directories(t, "overlays"), "base") {
		text := "resources: [../csi-disktemplate/deploy/kubernetes/" + dir + "]\n"
		if dir == "base" {
			text += "components:\n"
			for _, c := range directories(t, "components") {
				// microk8s and k0s say where the same directory is; vm-pool is for the overlays kubevirt.
				if c != "components/microk8s" && c != "components/vm-pool" {
					text += "- ../csi-disktemplate/deploy/kubernetes/" + c + "\n"
				}
			}
		}
		all := kustomize(t, text)
		for name, o := range all {
			b, err := yaml.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			said := strings.ReplaceAll(string(b), "- --page-endpoint=127.0.0.1:9809\n", "")
			if said != string(b) {
				seen++
			}
			exposes := func(word string) bool { return strings.Contains(said, word) }
			if slices.ContainsFunc([]string{"9809", "page-endpoint", "hostNetwork"}, exposes) {
				t.Errorf("%s: %s lets somebody reach the page:\n%s", dir, name, b)
			}
		}
	}
	if want := len(directories(t, "overlays")) + 1; seen != want {
		t.Errorf("%d plugins serve the page, want %d", seen, want)
	}
}

// feature is a component, or an overlay in the place of base, and the values that mean the same.
type feature struct{ name, values string }

// features are in the order in which docs/installing.md has users list components.
var features = []feature{
	{"overlays/directory", "pool: {path: /mnt/csi-disktemplate, loopbackSize: ''}"},
	{"components/claims", ""},
	{"components/snapshots", "snapshots: {enabled: true}"},
	{"components/prewarm", "prewarm: {enabled: true, templates: null}"},
	{"components/contents", "contents: {enabled: true, list: null}"},
	{"components/goldens", "goldens: {enabled: true, shared: null}"},
	{"components/monitors", "monitors: {enabled: true}"},
	{"components/selinux", "selinux: {enabled: true}"},
	{"components/openshift", "openshift: {enabled: true}"},
	{"components/k0s", "kubeletDir: /var/lib/k0s/kubelet"},
	{"components/microk8s", "kubeletDir: /var/snap/microk8s/common/var/lib/kubelet"},
	{"components/chosen-nodes", "nodes: {chosenOnly: true}"},
}

// together writes the values and the kustomization.yaml of some features, with what they need.
func together(names ...string) (text, kustomization string) {
	has := map[string]bool{}
	for _, name := range names {
		has[name] = true
	}
	has["components/selinux"] = has["components/selinux"] || has["components/openshift"]
	has["components/claims"] = has["components/claims"] || has["components/snapshots"]
	base, components := "base", "- ../csi-disktemplate/deploy/kubernetes/components/loopback\n"
	if has["overlays/directory"] { // it has the claims
		base, components, has["components/claims"] = "overlays/directory", "", false
	}
	if !has["components/claims"] && base == "base" {
		text = "claims: {enabled: false}\n"
	}
	for _, f := range features {
		if !has[f.name] {
			continue
		}
		text += f.values + "\n"
		if strings.HasPrefix(f.name, "components/") {
			components += "- ../csi-disktemplate/deploy/kubernetes/" + f.name + "\n"
		}
	}
	return text, "resources: [../csi-disktemplate/deploy/kubernetes/" + base + "]\ncomponents:\n" + components
}

// TestComponents compares each pair of components with the values that mean the same, and all that go together.
func TestComponents(t *testing.T) {
	var all []string
	for i, a := range features {
		for _, b := range features[i:] {
			if a.name != "components/k0s" || b.name != "components/microk8s" { // a kubelet has one directory
				compare(t, a.name, b.name)
			}
		}
		if a.name != "components/microk8s" {
			all = append(all, a.name)
		}
	}
	compare(t)
	compare(t, all...)
	compare(t, all[1:]...)
	for _, dir := range directories(t, "components") {
		alone := dir == "components/loopback" || dir == "components/vm-pool" // which TestOverlays compares
		if !alone && !slices.ContainsFunc(features, func(f feature) bool { return f.name == dir }) {
			t.Errorf("%s is compared with no values", dir)
		}
	}
}

func compare(t *testing.T, names ...string) {
	t.Helper()
	text, kustomization := together(names...)
	same(t, text, kustomization)
}

// TestLint runs helm lint, with the values as they are and with all turned on.
func TestLint(t *testing.T) {
	var all []string
	for _, f := range features {
		if f.name != "components/microk8s" {
			all = append(all, f.name)
		}
	}
	text, _ := together(all...)
	for _, text := range []string{"", text} {
		lint := action.NewLint()
		lint.Strict, lint.Namespace = true, namespace
		result := lint.Run([]string{filepath.Join(root, chartDir)}, parseValues(t, text))
		for _, m := range result.Messages {
			t.Log(m)
		}
		if len(result.Errors) > 0 || result.TotalChartsLinted != 1 {
			t.Error(result.Errors)
		}
	}
}
