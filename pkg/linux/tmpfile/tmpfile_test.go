// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package tmpfile

import (
	"errors"
	"os"
	"path/filepath"
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
		t.Errorf("it has a name already: %v %v", entries, err)
	}
	path := filepath.Join(dir, "name")
	if err := errors.Join(Link(f, path), SyncDir(dir)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "content" {
		t.Errorf("%q %v", b, err)
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
		t.Errorf("what was there is now %q %v", b, err)
	}
}

func TestCreateNames(t *testing.T) {
	if _, err := Create("/nonexistent", 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
