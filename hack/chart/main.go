// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	manifests = "deploy/kubernetes"
	chartDir  = "deploy/helm/csi-disktemplate"
	namespace = "csi-disktemplate" // in the manifests
)

func main() {
	if err := run("../.."); err != nil {
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

// run writes the templates of the repository at root.
func run(root string) error {
	files, err := generate(filepath.Join(root, manifests))
	if err != nil {
		return err
	}
	templates := filepath.Join(root, chartDir, "templates")
	old, err := written(templates)
	if err != nil {
		return err
	}
	for name := range old {
		if _, ok := files[name]; !ok {
			err = errors.Join(err, os.Remove(filepath.Join(templates, name)))
		}
	}
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(templates, name), []byte(text), 0o644))
	}
	return err
}

// mark begins every file that this program writes. Other templates are written by hand.
const mark = "{{- /* Written by `make chart` from "

// written returns the templates that this program has written, by name.
func written(dir string) (map[string]string, error) {
	files := map[string]string{}
	names, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	for _, name := range names {
		b, e := os.ReadFile(name)
		if err = errors.Join(err, e); strings.HasPrefix(string(b), mark) {
			files[filepath.Base(name)] = string(b)
		}
	}
	return files, err
}

// generate makes the templates, by file name, of the manifests in a directory.
func generate(root string) (map[string]string, error) {
	units := map[string]*unit{}
	var all []*document
	for _, p := range parts {
		u, err := load(root, p.dir)
		if err != nil {
			return nil, err
		}
		units[p.dir] = u
		for _, d := range u.documents() {
			if err := inherit(u, d); err != nil {
				return nil, err
			}
		}
		all = append(all, u.documents()...)
		if err := p.patch(u, all); err != nil {
			return nil, err
		}
	}
	for _, d := range all {
		if err := special(d); err != nil {
			return nil, err
		}
	}
	return templates(units), nil
}

// templates renders each resource into a file, behind the value that turns its part on.
func templates(units map[string]*unit) map[string]string {
	files := map[string]string{}
	for _, p := range parts {
		for _, name := range slices.Sorted(maps.Keys(units[p.dir].files)) {
			condition := p.on
			if file := filepath.Join(p.dir, name); file == "base/namespace.yaml" {
				condition = ".Values.namespace.create"
			}
			text := mark + filepath.Join(manifests, p.dir, name) + ": edit that. */ -}}\n"
			if condition != "" {
				text += "{{- if " + condition + " }}\n"
			}
			for i, d := range units[p.dir].files[name] {
				text += section(d, i)
			}
			if condition != "" {
				text += "{{- end }}\n"
			}
			files[fileName(p.dir, name)] = text
		}
	}
	return files
}

// section renders a document. Each StorageClass of claims can be left out by its filesystem.
func section(d *document, i int) string {
	text := d.render()
	if i > 0 {
		text = "---\n" + text
	}
	if fs := d.text("/parameters/csi.storage.k8s.io~1fstype"); d.text("/kind") == "StorageClass" && fs != "" {
		text = fmt.Sprintf("{{- if has %q .Values.claims.storageClasses }}\n%s{{- end }}\n", fs, text)
	}
	return text
}

// fileName names a template: plugin.yaml of base, and claims-rbac.yaml of components/claims.
func fileName(dir, name string) string {
	if dir == "base" {
		return name
	}
	return filepath.Base(dir) + "-" + name
}

// patch weaves the patches of a component into the documents that they are for.
func (p part) patch(u *unit, all []*document) error {
	patches, err := u.patches()
	if err != nil {
		return err
	}
	for literal := range p.values {
		if !slices.ContainsFunc(u.Patches, func(raw rawPatch) bool { return strings.Contains(raw.Patch, literal) }) {
			return fmt.Errorf("%s: no patch has %q any more; see parts in plan.go", p.dir, literal)
		}
	}
	for _, patch := range patches {
		found := false
		for _, d := range all {
			if d.text("/kind") != patch.kind || !patch.name.MatchString(d.text("/metadata/name")) {
				continue
			}
			found = true
			for _, o := range patch.operations {
				if err := p.weave(d, o); err != nil {
					return fmt.Errorf("%s: %s %s in %s: %w", p.dir, o.Op, o.Path, d.file, err)
				}
			}
		}
		if !found {
			return fmt.Errorf("%s: nothing is named %s", p.dir, patch.name)
		}
	}
	return nil
}

// weave carries out one step of a patch, behind the value that turns the component on.
func (p part) weave(d *document, o operation) error {
	lines, err := p.value(o)
	if err != nil {
		return err
	}
	dir, step := filepath.Split(o.Path)
	_, parent := d.find(strings.TrimSuffix(dir, "/"))
	_, there := d.find(o.Path)
	switch {
	case o.Op == "test" && there != nil && there.Value == o.Value.Value:
		return nil
	case o.Op == "replace" && there != nil && p.on == "":
		return d.replace(there, lines[0])
	case o.Op == "replace" && there != nil:
		return d.replace(there, "{{ if "+p.on+" }}"+lines[0]+"{{ else }}"+there.Value+"{{ end }}")
	case o.Op == "add" && parent != nil && parent.Kind == yaml.SequenceNode && step == "-":
		d.add(parent, p.on, append(o.comment, item(lines)...)...)
		return nil
	case o.Op == "add" && parent != nil && there == nil && parent.Style&yaml.FlowStyle != 0:
		return d.more(parent, "{{ if "+p.on+" }}, "+unescape(step)+": "+lines[0]+"{{ end }}")
	case o.Op == "add" && parent != nil && there == nil:
		d.first(parent, slices.Concat([]string{"{{- if " + p.on + " }}"}, o.comment,
			entry(unescape(step), &o.Value, lines), []string{"{{- end }}"})...)
		return nil
	}
	return errors.New("this step has no form in the chart")
}

// value renders the value of a step, with what the chart has in the place of some literals.
func (p part) value(o operation) ([]string, error) {
	lines, err := encode(&o.Value)
	if err != nil {
		return nil, err
	}
	for i := range lines {
		for literal, text := range p.values {
			lines[i] = strings.ReplaceAll(lines[i], literal, text)
		}
	}
	return lines, nil
}

// item is a value as an item of a block sequence.
func item(lines []string) []string {
	var all []string
	for i, l := range lines {
		all = append(all, map[bool]string{true: "- ", false: "  "}[i == 0]+l)
	}
	return all
}

// entry is a key and its value as an entry of a block mapping.
func entry(key string, value *yaml.Node, lines []string) []string {
	if len(lines) == 1 {
		return []string{key + ": " + lines[0]}
	}
	all := []string{key + ":"}
	for _, l := range lines {
		if value.Kind != yaml.SequenceNode {
			l = "  " + l
		}
		all = append(all, l)
	}
	return all
}
