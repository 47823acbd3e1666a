// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// kustomization is what the generator reads of a kustomization.yaml. A field that it does not know fails, so that
// nothing is left out of the chart unseen.
type kustomization struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Namespace  string
	Labels     []struct {
		Pairs            yaml.Node
		IncludeTemplates bool `yaml:"includeTemplates"`
	}
	Resources  []string
	Components []string
	Patches    []rawPatch
}

type rawPatch struct {
	Target struct{ Kind, Name string }
	Patch  string
}

// operation is one step of a JSON patch.
type operation struct {
	Op, Path string
	Value    yaml.Node
	comment  []string
}

// unit is a directory of deploy/kubernetes, with the documents of its resources.
type unit struct {
	dir string
	kustomization
	files map[string][]*document // by the resource's name
}

// load reads a directory. Resources that are directories belong to other units.
func load(root, dir string) (*unit, error) {
	u := &unit{dir: dir, files: map[string][]*document{}}
	f, err := os.Open(filepath.Join(root, dir, "kustomization.yaml"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	decoder := yaml.NewDecoder(f)
	decoder.KnownFields(true)
	if err := decoder.Decode(&u.kustomization); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	for _, name := range u.Resources {
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(root, dir, name))
		if err != nil {
			return nil, err
		}
		if u.files[name], err = parse(filepath.Join(dir, name), literal(string(b))); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// literal is a text that Helm's templates show as it is: alerts have templates of their own.
func literal(text string) string { return strings.ReplaceAll(text, "{{", `{{ "{{" }}`) }

// documents returns all documents of a unit.
func (u *unit) documents() (all []*document) {
	for _, name := range u.Resources {
		all = append(all, u.files[name]...)
	}
	return all
}

// patch is a patch of a component, with the kind and the names of the objects that it is for.
type patch struct {
	kind       string
	name       *regexp.Regexp
	operations []operation
}

func (u *unit) patches() ([]patch, error) {
	var all []patch
	for _, p := range u.Patches {
		name, err := regexp.Compile("^(?:" + p.Target.Name + ")$")
		operations, parsed := parsePatch(p.Patch)
		if err = errors.Join(err, parsed); err != nil {
			return nil, fmt.Errorf("%s: %w", u.dir, err)
		}
		all = append(all, patch{p.Target.Kind, name, operations})
	}
	return all, nil
}

// parsePatch reads a JSON patch and keeps the comments above its steps.
func parsePatch(text string) ([]operation, error) {
	var list yaml.Node
	if err := yaml.Unmarshal([]byte(text), &list); err != nil {
		return nil, err
	}
	var all []operation
	for _, n := range list.Content[0].Content {
		var o operation
		if err := n.Decode(&o); err != nil {
			return nil, err
		}
		// A value may be an alias, as &directory of an earlier step.
		if o.Value.Kind == yaml.AliasNode {
			o.Value = *o.Value.Alias
		}
		o.Value.Anchor = ""
		if n.HeadComment != "" {
			o.comment = strings.Split(n.HeadComment, "\n")
		}
		all = append(all, o)
	}
	return all, nil
}

// encode writes a value in its own style, without indentation.
func encode(n *yaml.Node) ([]string, error) {
	var b strings.Builder
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	e.CompactSeqIndent()
	if err := e.Encode(n); err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n"), nil
}
