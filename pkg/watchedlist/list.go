// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package watchedlist reads a list that the operator may replace at any time: a YAML file that is a map with one
// key, which has a list of maps. Each of these entries has a name that no other one has.
//
// An entry that is wrong is left out, and the others count all the same. While the file cannot be read, what it
// said last counts. Both are conditions.
package watchedlist

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

// maxShown is how many names are shown in a message, and how many entries in conditions.
const maxShown = 20

// List is a file and what it lists. Its methods may be called at the same time.
type List[T any] struct {
	format Format[T]

	mu      sync.Mutex
	file    watchedfile.File
	entries []T
	bad     []Bad
	unread  error // why the file cannot be opened and read
	invalid error // why nothing in it can be understood
}

// Open reads a file. An empty path is a list with nothing in it.
func Open[T any](path string, f Format[T]) *List[T] {
	l := &List[T]{format: f, file: watchedfile.File{Path: path}}
	l.Look()
	return l
}

// Look reads the file if it has changed. It takes microseconds if it has not.
func (l *List[T]) Look() {
	l.mu.Lock()
	defer l.mu.Unlock()
	var changed bool
	if changed, l.unread = l.file.Look(); !changed {
		return
	}
	entries, bad, err := l.format.Parse(l.file.Content)
	if l.invalid = err; err != nil {
		return
	}
	l.entries, l.bad = entries, bad
	klog.InfoS("Read the list of "+l.format.What, "file", l.file.Path, l.format.Key, len(entries), "badEntries", len(bad))
}

// All are the entries that were right when the file was read last, in its order. The caller must not change them.
func (l *List[T]) All() []T {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.entries
}

// May reports whether there is an entry of that name that somebody may use. If not, it returns the names of those
// that he may use, for a message.
func (l *List[T]) May(name string, may func(T) bool) (ok bool, instead string) {
	var names []string
	for _, entry := range l.All() {
		if !may(entry) {
			continue
		}
		has := *l.format.Name(&entry)
		if has == name {
			return true, ""
		}
		names = append(names, has)
	}
	slices.Sort(names)
	return false, some(names)
}

func some(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	text := strings.Join(names[:min(len(names), maxShown)], ", ")
	if more := len(names) - maxShown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// Conditions are those that leave the plugin ready: the file cannot be read, or an entry of it is wrong. At most
// 20 entries are shown.
func (l *List[T]) Conditions(code string) (found []health.Condition) {
	l.mu.Lock()
	defer l.mu.Unlock()
	add := func(object, text, remedy string) {
		found = append(found, health.Condition{
			Code: code, Object: object, Severity: health.Degraded, Text: text, Remedy: remedy, StillReady: true,
		})
	}
	const remedy = "correct it; what it listed before stays listed"
	path, what := l.file.Path, "the list of "+l.format.What
	switch {
	case l.unread != nil:
		add(path, fmt.Sprintf("%s cannot be read: %v", what, l.unread), remedy)
	case l.invalid != nil:
		add(path, fmt.Sprintf("%s %s: %v", what, path, l.invalid), remedy)
	}
	for _, b := range l.bad[:min(len(l.bad), maxShown)] {
		add(path+": "+b.Entry, fmt.Sprintf("%s of %s %s is left out: %v", b.Entry, what, path, b.Err), "")
	}
	return found
}
