// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

const (
	// maxListed is how many templates a file may list. At 0.5 s to 5 s each, building so many takes
	// an hour of one VM, and no node has so many kinds of disks.
	maxListed = 1000
	// maxShown is how many bad lines, or templates that fail, are shown one by one.
	maxShown = 20
)

// badLine is a line that is no spec.
type badLine struct {
	number int
	err    error
}

// parse reads the content of a file. A template that is listed twice counts once.
func parse(content []byte) (specs []diskfs.Spec, bad []badLine) {
	number := 0
	for line := range bytes.Lines(content) {
		number++
		text, _, _ := strings.Cut(string(line), "#")
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		spec, err := diskfs.ParseSpec(text)
		switch {
		case err != nil:
			bad = append(bad, badLine{number, fmt.Errorf("%.64q: %w", text, err)})
		case slices.ContainsFunc(specs, spec.Equal):
		case len(specs) == maxListed:
			bad = append(bad, badLine{number, fmt.Errorf("%.64q: at most %d templates may be listed; list fewer", text, maxListed)})
		default:
			specs = append(specs, spec)
		}
	}
	return specs, bad
}

// file is a list that somebody may replace at any time.
type file struct {
	watchedfile.File
	specs []diskfs.Spec
	bad   []badLine
}

// look reads the file if it has changed, and reports whether its content has. An error leaves what was
// read last.
func (f *file) look() (changed bool, err error) {
	if changed, err = f.Look(); changed {
		f.specs, f.bad = parse(f.Content)
	}
	return changed, err
}
