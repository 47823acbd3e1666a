// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// document is one YAML document: its text, and what will be woven into it. Edits name positions of the original
// text, so their order does not matter, except at the same position.
type document struct {
	file  string // below deploy/kubernetes
	lines []string
	root  *yaml.Node
	edits []edit
	adds  []added // in the order in which they come
}

// edit inserts text at a position, in place of a number of bytes. Whole lines are inserted at column 0.
type edit struct {
	line, column int // from 0
	length       int
	text         string
}

// added are lines for the end of a sequence, and the condition that they need, if any.
type added struct {
	sequence  *yaml.Node
	condition string
	lines     []string
}

// parse splits a file into documents. Comments before a document belong to it.
func parse(file, text string) ([]*document, error) {
	var all []*document
	for part := range strings.SplitSeq(text, "\n---\n") {
		var root yaml.Node
		if err := yaml.Unmarshal([]byte(part), &root); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if len(root.Content) != 1 {
			return nil, fmt.Errorf("%s: an empty document", file)
		}
		lines := strings.Split(strings.TrimSuffix(part, "\n"), "\n")
		all = append(all, &document{file: file, lines: lines, root: root.Content[0]})
	}
	return all, nil
}

// find returns the node at a JSON pointer, and the key that leads to it, if its parent is a mapping. Both are
// nil if it is not there.
func (d *document) find(pointer string) (key, value *yaml.Node) {
	value = d.root
	for step := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
		if key, value = child(value, unescape(step)); value == nil {
			return nil, nil
		}
	}
	return key, value
}

func unescape(step string) string {
	return strings.NewReplacer("~1", "/", "~0", "~").Replace(step)
}

func child(n *yaml.Node, step string) (key, value *yaml.Node) {
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i], n.Content[i+1]
			}
		}
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(step); err == nil && i < len(n.Content) {
			return nil, n.Content[i]
		}
	}
	return nil, nil
}

// text returns the string at a pointer, or "".
func (d *document) text(pointer string) string {
	if _, n := d.find(pointer); n != nil {
		return n.Value
	}
	return ""
}

// replace puts other text in the place of a plain scalar.
func (d *document) replace(n *yaml.Node, text string) error {
	line, column := n.Line-1, n.Column-1
	if n.Kind != yaml.ScalarNode || !strings.HasPrefix(d.lines[line][column:], n.Value) {
		return fmt.Errorf("%s:%d: not a plain scalar on one line", d.file, n.Line)
	}
	d.edits = append(d.edits, edit{line, column, len(n.Value), text})
	return nil
}

// insert puts lines before a line.
func (d *document) insert(line int, lines ...string) {
	d.edits = append(d.edits, edit{line: line, text: strings.Join(lines, "\n") + "\n"})
}

// last returns the number of the last line of a node, from 0.
func last(n *yaml.Node) int {
	line := n.Line - 1
	for _, c := range n.Content {
		line = max(line, last(c))
	}
	return line
}

func indent(n *yaml.Node) string { return strings.Repeat(" ", n.Column-1) }

// wrap makes an entry of a block mapping depend on a value: where the value is given, the key has that in place
// of what the source says.
func (d *document) wrap(key, value *yaml.Node, condition, given string) {
	pad := indent(key)
	head, _, _ := strings.Cut(d.lines[key.Line-1], " #")
	head += fmt.Sprintf(" {{- toYaml %s | nindent %d }}", given, key.Column+1)
	d.insert(key.Line-1, pad+"{{- "+condition+" }}", head, pad+"{{- else }}")
	d.insert(last(value)+1, pad+"{{- end }}")
}

// first inserts lines before the first entry of a block mapping.
func (d *document) first(n *yaml.Node, lines ...string) {
	pad := indent(n)
	for i := range lines {
		lines[i] = pad + lines[i]
	}
	d.insert(n.Content[0].Line-1, lines...)
}

// more adds text before the closing brace of a flow mapping on one line.
func (d *document) more(n *yaml.Node, text string) error {
	line, column := n.Line-1, n.Column-1
	for i, depth := column, 0; i < len(d.lines[line]); i++ {
		switch d.lines[line][i] {
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				d.edits = append(d.edits, edit{line: line, column: i, text: text})
				return nil
			}
		}
	}
	return fmt.Errorf("%s:%d: a flow mapping that does not end on its line", d.file, n.Line)
}

// add appends to a block sequence.
func (d *document) add(sequence *yaml.Node, condition string, lines ...string) {
	for i := range d.adds {
		if a := &d.adds[i]; a.sequence == sequence && a.condition == condition {
			a.lines = append(a.lines, lines...)
			return
		}
	}
	d.adds = append(d.adds, added{sequence, condition, lines})
}

// flush turns what was added to sequences into edits.
func (d *document) flush() {
	for _, a := range d.adds {
		if a.condition != "" {
			a.lines = slices.Concat([]string{"{{- if " + a.condition + " }}"}, a.lines, []string{"{{- end }}"})
		}
		for i := range a.lines {
			a.lines[i] = indent(a.sequence) + a.lines[i]
		}
		d.insert(last(a.sequence)+1, a.lines...)
	}
	d.adds = nil
}

// render carries out the edits.
func (d *document) render() string {
	d.flush()
	slices.SortStableFunc(d.edits, func(a, b edit) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.column, b.column))
	})
	var b strings.Builder
	edits := d.edits
	for i, line := range append(d.lines, "") {
		column := 0
		for ; len(edits) > 0 && edits[0].line == i; edits = edits[1:] {
			e := edits[0]
			b.WriteString(line[column:e.column] + e.text)
			column = e.column + e.length
		}
		if i < len(d.lines) {
			b.WriteString(line[column:] + "\n")
		}
	}
	return b.String()
}
