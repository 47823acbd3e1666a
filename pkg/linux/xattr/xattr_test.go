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
