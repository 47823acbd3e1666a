// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package xattr

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestAttribute(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const name = "user.test"
	if v, err := Get(f, name, 10); !errors.Is(err, syscall.ENODATA) || !strings.Contains(err.Error(), f.Name()) {
		t.Errorf("an attribute that does not exist: %q, %v", v, err)
	}
	for _, value := range []string{"first", "the second", ""} {
		if err := Set(f, name, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if v, err := Get(f, name, 10); err != nil || string(v) != value {
			t.Errorf("got %q, want %q: %v", v, value, err)
		}
	}
	if err := Set(f, name, []byte("longer than ten")); err != nil {
		t.Fatal(err)
	}
	if v, err := Get(f, name, 10); !errors.Is(err, syscall.ERANGE) {
		t.Errorf("a value that is too long: %q, %v", v, err)
	}
	for range 2 {
		if err := Remove(f, name); err != nil {
			t.Error(err)
		}
		if _, err := Get(f, name, 10); !errors.Is(err, syscall.ENODATA) {
			t.Errorf("after Remove: %v", err)
		}
	}
}

// TestAttributeAt reads attributes of files that are not open, of every length around that of the
// first buffer.
func TestAttributeAt(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	f, err := os.Create(filepath.Join(dir.Name(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const name = "user.test"
	for _, n := range []int{0, 1, usual - 1, usual, usual + 1, 2 * usual} {
		want := strings.Repeat("x", n)
		if err := Set(f, name, []byte(want)); err != nil {
			t.Fatal(err)
		}
		if v, err := GetAt(dir, "file", name, 2*usual); err != nil || string(v) != want {
			t.Errorf("GetAt of %d bytes returns %d: %v", n, len(v), err)
		}
		if v, err := Get(f, name, 2*usual); err != nil || string(v) != want {
			t.Errorf("Get of %d bytes returns %d: %v", n, len(v), err)
		}
	}
	if _, err := GetAt(dir, "file", name, usual); !errors.Is(err, syscall.ERANGE) {
		t.Errorf("a value that is too long: %v", err)
	}
	if err := os.Symlink("file", filepath.Join(dir.Name(), "link")); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]error{"missing": os.ErrNotExist, "link": syscall.ENODATA} {
		v, err := GetAt(dir, file, name, usual)
		if file == "link" && errors.Is(err, syscall.EPERM) {
			continue // a link has no user attributes: xattr(7)
		}
		if !errors.Is(err, want) || !strings.Contains(err.Error(), filepath.Join(dir.Name(), file)) {
			t.Errorf("%s: %q, %v", file, v, err)
		}
	}
}

func TestClosedFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	_, err = Get(f, "user.test", 10)
	for call, err := range map[string]error{"Get": err, "Set": Set(f, "user.test", nil), "Remove": Remove(f, "user.test")} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s of a closed file: %v", call, err)
		}
	}
}
