// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package tmpfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLink(t *testing.T) {
	dir := t.TempDir()
	f, err := Create(dir, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("before Link the directory has %v: %v", entries, err)
	}
	path := filepath.Join(dir, "name")
	if err := errors.Join(Link(f, path), SyncDir(dir)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "content" {
		t.Errorf("the linked file has %q: %v", b, err)
	}
	other, err := Create(dir, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := Link(other, path); !errors.Is(err, os.ErrExist) {
		t.Errorf("replacing an existing name: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "content" {
		t.Errorf("the file that had the name has %q now: %v", b, err)
	}
}

// TestMessages: an error names what the operator can find, and that is not a file without a name.
func TestMessages(t *testing.T) {
	dir := t.TempDir()
	f, err := Create(dir, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	taken := filepath.Join(dir, "taken")
	if err := os.WriteFile(taken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err, want := Link(f, taken), "linkat "+taken+": file exists"; err == nil || err.Error() != want {
		t.Errorf("the name is taken: %v, want %s", err, want)
	}
	f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); err == nil || !strings.Contains(err.Error(), "unnamed file in "+dir+":") {
		t.Errorf("a failed write: %v", err)
	}
}

func TestCreateNames(t *testing.T) {
	if _, err := Create("/nonexistent", 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("in a directory that does not exist: %v", err)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "name")
	for i, content := range []string{"first", "second", "third"} {
		f, err := Create(dir, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(content); err != nil {
			t.Fatal(err)
		}
		if i == 2 { // as if a process had died before the rename
			if err := os.WriteFile(filepath.Join(dir, ".name.new"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := Replace(f, path); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != content {
			t.Errorf("the file has %q, want %q: %v", b, content, err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the directory has %v, want one file: %v", entries, err)
	}
}
