// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/disks"
)

func TestPaths(t *testing.T) {
	for _, c := range []struct {
		output string
		count  int
		want   []string // nil is an error
	}{
		{"disk.img", 0, []string{"disk.img"}},
		{"disk-{}.img", 0, []string{"disk-{}.img"}}, // as before there were many
		{"disk-{}.img", 1, []string{"disk-1.img"}},
		{"{}/disk-{}.img", 2, []string{"1/disk-1.img", "2/disk-2.img"}},
		{"disk.img", 1, nil},
	} {
		o := diskOptions{output: c.output, count: c.count}
		if got, err := o.paths(); !slices.Equal(got, c.want) || (err == nil) != (c.want != nil) {
			t.Errorf("%s, %d: %q, %v", c.output, c.count, got, err)
		}
	}
}

func TestCheckPaths(t *testing.T) {
	dir := t.TempDir()
	paths := []string{filepath.Join(dir, "1"), filepath.Join(dir, "2"), filepath.Join(dir, "3")}
	if err := errors.Join(os.WriteFile(paths[1], nil, 0o600), os.WriteFile(paths[2], nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	o := diskOptions{output: filepath.Join(dir, "{}")}
	if err := o.checkPaths(paths[:1]); err != nil {
		t.Error(err)
	}
	if err := o.checkPaths(paths); err == nil || !strings.Contains(err.Error(), "2 of the 3 files exist already, the first is "+paths[1]) {
		t.Error(err)
	}
	o.force = true
	if err := o.checkPaths(paths); err != nil {
		t.Error(err)
	}
	if err := o.checkPaths([]string{dir}); err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Error(err)
	}
}

func TestRanges(t *testing.T) {
	paths := []string{"1", "2", "3", "4", "5", "6"}
	for want, made := range map[string][]string{
		"": nil, "1 to 6": paths, "1 to 3, 5": {"1", "2", "3", "5"}, "2, 4, 6": {"2", "4", "6"}, "5 to 6": {"5", "6"},
	} {
		var there []disks.Made
		for _, path := range made {
			there = append(there, disks.Made{Path: path})
		}
		if got := ranges(there, paths); got != want {
			t.Errorf("of %q: %q, want %q", made, got, want)
		}
	}
}
