// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	// maxFile is the most that a ConfigMap can hold, in bytes.
	maxFile = 1 << 20
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
	path    string
	seen    identity // of the file that was read last
	content []byte   // of that file
	specs   []diskfs.Spec
	bad     []badLine
}

// identity changes whenever a file is replaced or written to.
type identity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// look reads the file if it has changed, and reports whether its content has. An error leaves what was
// read last.
func (f *file) look() (changed bool, err error) {
	if f.path == "" {
		return false, nil
	}
	// Opening a FIFO would hang without O_NONBLOCK.
	open, err := os.OpenFile(f.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer open.Close()
	now, err := identify(open)
	if err != nil || now == f.seen {
		return false, err
	}
	content, err := io.ReadAll(io.LimitReader(open, maxFile+1))
	if err != nil {
		return false, err
	}
	if len(content) > maxFile {
		return false, fmt.Errorf("%s has more than %s", f.path, size.Format(maxFile))
	}
	f.seen = now
	if bytes.Equal(content, f.content) {
		return false, nil
	}
	f.content = content
	f.specs, f.bad = parse(content)
	return true, nil
}

func identify(f *os.File) (identity, error) {
	fi, err := f.Stat()
	if err != nil {
		return identity{}, err
	}
	if !fi.Mode().IsRegular() {
		return identity{}, &os.PathError{Op: "read", Path: f.Name(), Err: errors.New("not a regular file")}
	}
	st := fi.Sys().(*syscall.Stat_t)
	return identity{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}
