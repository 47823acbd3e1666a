// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
)

func TestOpenNeedsDirectory(t *testing.T) {
	_, err := Open(t.Context(), Config{})
	if err == nil || !strings.Contains(err.Error(), "--pool") {
		t.Errorf("Open without a directory: %v", err)
	}
}

func TestExisting(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "nowhere"), filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "real"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "real"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"":              "",
		"real/a/b/c":    "real",
		"dangling/pool": "", // a dangling link counts as missing
		"link":          "link",
		"link/pool":     "link",
	} {
		got, err := existing(filepath.Join(dir, path))
		if err != nil || got != filepath.Join(dir, want) {
			t.Errorf("existing(%q) is %q, want %q: %v", path, got, filepath.Join(dir, want), err)
		}
	}
}

func TestOwnDir(t *testing.T) {
	dir := t.TempDir()
	fresh := filepath.Join(dir, "a", "b")
	if err := ownDir(fresh); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(fresh); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("a new directory has mode %v, want 0700: %v", fi.Mode(), err)
	}
	if err := os.Chmod(fresh, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := ownDir(fresh); err == nil || !strings.Contains(err.Error(), "chmod 0700 "+fresh) {
		t.Errorf("a directory that others may write to: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ownDir(file); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file: %v", err)
	}
}

// TestUnreadableRecords checks what is said about records that cannot be read.
func TestUnreadableRecords(t *testing.T) {
	for text, says := range map[string]string{
		`{"version":"two"}`: "its field version is of another type: a string",
		`{"version":2`:      "it is not the JSON of one",
		``:                  "it is not the JSON of one",
		`[]`:                "it is not the JSON of one",
	} {
		var record struct {
			Version int `json:"version"`
		}
		err := decode([]byte(text), &record)
		if !errors.Is(err, ErrNoRecord) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, not %q", text, err, says)
			continue
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Errorf("%q: %s: %v", text, fault, err)
		}
	}
}
