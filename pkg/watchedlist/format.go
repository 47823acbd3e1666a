// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package watchedlist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// MaxEntries is how many entries a file may list. A message to users may name all that they may use.
const MaxEntries = 1000

// Format says how entries of one type are read.
type Format[T any] struct {
	Key  string // the one key of the file
	What string // what it lists, for people
	Has  string // what an entry has, for people
	// Name is where an entry has its name, which is a DNS label.
	Name func(entry *T) *string
	// Fields are what an entry may have besides, and how each is read. A value is a string, a [json.Number], a bool,
	// nil, []any or map[string]any.
	Fields map[string]func(entry *T, value any) error
	// Complete checks what several fields say together. has are the entry's fields.
	Complete func(entry *T, has map[string]any) error
}

// Bad is an entry that counts for nothing.
type Bad struct {
	Entry string // its number, and its name if it has one
	Err   error
}

// Parse reads the content of a file. An error means that nothing of it can be read.
func (f Format[T]) Parse(content []byte) (list []T, bad []Bad, err error) {
	found, err := entries(content, f.Key)
	if err != nil {
		return nil, nil, err
	}
	seen := map[string]bool{}
	for i, fields := range found {
		entry, err := f.entry(fields)
		name := *f.Name(&entry)
		switch {
		case err != nil:
		case len(list) == MaxEntries:
			err = fmt.Errorf("at most %d %s may be listed; list fewer", MaxEntries, f.What)
		case seen[name]:
			err = errors.New("another entry before it has the same name; give it one of its own")
		}
		if err != nil {
			bad = append(bad, Bad{describe(i+1, name), err})
			continue
		}
		seen[name] = true
		list = append(list, entry)
	}
	return list, bad, nil
}

func describe(number int, name string) string {
	if name == "" {
		return fmt.Sprintf("entry %d", number)
	}
	return fmt.Sprintf("entry %d (%s)", number, name)
}

const nameField = "name"

// entry reads an entry. The name is returned with an error too, if it is one.
func (f Format[T]) entry(fields map[string]any) (entry T, err error) {
	if fields == nil {
		return entry, fmt.Errorf("must be a map, with %s", f.Has)
	}
	var faults []error
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		if err := f.set(&entry, key, fields[key]); err != nil {
			faults = append(faults, err)
		}
	}
	if len(faults) > 0 {
		return entry, faults[0] // one fault is enough to work on, and a message has one line
	}
	if _, ok := fields[nameField]; !ok {
		return entry, errors.New("name is missing")
	}
	return entry, f.Complete(&entry, fields)
}

func (f Format[T]) set(entry *T, key string, value any) (err error) {
	set, ok := f.Fields[key]
	switch {
	case key == nameField:
		*f.Name(entry), err = label(value)
	case !ok:
		known := append(slices.Collect(maps.Keys(f.Fields)), nameField)
		slices.Sort(known)
		return fmt.Errorf("the field %.64q is unknown; there are %s", key, strings.Join(known, ", "))
	default:
		err = set(entry, value)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w", key, show(value), err)
	}
	return err
}

// entries returns the fields of each entry. An entry that is no map has none.
func entries(content []byte, only string) ([]map[string]any, error) {
	text, err := yaml.YAMLToJSONStrict(content)
	if err != nil {
		return nil, syntaxError(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var top any
	if err := decoder.Decode(&top); err != nil {
		return nil, errors.New("it is no YAML")
	}
	file, ok := top.(map[string]any)
	if !ok && top != nil {
		return nil, fmt.Errorf("it must be a map with the one key %q", only)
	}
	for key := range maps.Keys(file) {
		if key != only {
			return nil, fmt.Errorf("the key %.64q is unknown: the only one is %q", key, only)
		}
	}
	list, ok := file[only].([]any)
	if !ok && file[only] != nil {
		return nil, fmt.Errorf("%q must be a list", only)
	}
	entries := make([]map[string]any, len(list))
	for i, e := range list {
		entries[i], _ = e.(map[string]any)
	}
	return entries, nil
}

// yamlLine is what the parser says about a place in the file.
var yamlLine = regexp.MustCompile(`line [0-9]+: [^\n]*`)

// syntaxError says what is wrong with the file, and repeats the parser's words as such.
func syntaxError(err error) error {
	text := yamlLine.FindString(err.Error())
	if text == "" || strings.Contains(text, "unmarshal") {
		return errors.New("it is no YAML of maps, lists and single values")
	}
	return fmt.Errorf("it is no valid YAML; the parser says %.200q", text)
}
