// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

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

// maxContents is how many contents a file may list. A message to users names all that they may use.
const maxContents = 1000

// badEntry is an entry that counts for nothing.
type badEntry struct {
	entry string // its number, and its name if it has one
	err   error
}

// parse reads the content of a file. An error means that nothing of it can be read.
func parse(content []byte) (contents []Content, bad []badEntry, err error) {
	list, err := entries(content)
	if err != nil {
		return nil, nil, err
	}
	for i, fields := range list {
		c, err := parseEntry(fields)
		switch {
		case err != nil:
		case len(contents) == maxContents:
			err = fmt.Errorf("at most %d contents may be listed; list fewer", maxContents)
		case slices.ContainsFunc(contents, func(o Content) bool { return o.Name == c.Name }):
			err = errors.New("another entry before it has the same name; give it one of its own")
		}
		if err != nil {
			bad = append(bad, badEntry{describe(i+1, c.Name), err})
			continue
		}
		contents = append(contents, c)
	}
	return contents, bad, nil
}

func describe(number int, name string) string {
	if name == "" {
		return fmt.Sprintf("entry %d", number)
	}
	return fmt.Sprintf("entry %d (%s)", number, name)
}

// entries returns the fields of each entry. An entry that is no map has none.
func entries(content []byte) ([]map[string]any, error) {
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
		return nil, errors.New(`it must be a map with the one key "contents"`)
	}
	for key := range maps.Keys(file) {
		if key != "contents" {
			return nil, fmt.Errorf(`the key %.64q is unknown: the only one is "contents"`, key)
		}
	}
	list, ok := file["contents"].([]any)
	if !ok && file["contents"] != nil {
		return nil, errors.New(`"contents" must be a list`)
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
