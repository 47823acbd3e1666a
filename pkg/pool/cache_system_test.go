// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package pool

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestOpenCache opens a cache on filesystems that can hold no pool too, and opens it again.
func TestOpenCache(t *testing.T) {
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Ext4} {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 512<<20), "new", "cache")
			for range 2 {
				p, err := OpenCache(dir)
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				lock, err := p.TryLock("key")
				if err != nil || lock == nil {
					t.Fatalf("locking: %v", err)
				}
				var note string
				err = errors.Join(p.Note("key", VerifiedAttr, "noted"), p.Noted("key", VerifiedAttr, &note), lock.Unlock())
				if err != nil || note != "noted" {
					t.Errorf("the note is %q: %v", note, err)
				}
				if keys, err := p.Templates(); err != nil || len(keys) > 0 {
					t.Errorf("a new cache has the templates %q: %v", keys, err)
				}
				if s, err := p.Space(); err != nil || s.Available == 0 {
					t.Errorf("its space is %+v: %v", s, err)
				}
			}
			entries, err := os.ReadDir(dir)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			if want := []string{cacheDir, locksDir, templatesDir}; err != nil || !slices.Equal(names, want) {
				t.Errorf("it has %q, want %q: %v", names, want, err)
			}
		})
	}
}

// TestOpenCacheRefuses: whoever may write to a cache decides what disks have in them.
func TestOpenCacheRefuses(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 64<<20)
	others, open, file := filepath.Join(fs, "others"), filepath.Join(fs, "open"), filepath.Join(fs, "file")
	if err := errors.Join(
		os.Mkdir(others, 0o700), os.Chown(others, 65534, 65534), os.Mkdir(open, 0o700), os.Chmod(open, 0o777),
		os.WriteFile(file, nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{others, open, file} {
		if p, err := OpenCache(dir); !errors.Is(err, ErrUnusable) {
			t.Errorf("%s: %v, %v", dir, p, err)
		}
	}
	full := testenv.Ext4.Mount(t, 64<<20)
	testenv.Fill(t, full)
	if _, err := OpenCache(filepath.Join(full, "cache")); !errors.Is(err, ErrFull) {
		t.Errorf("a full filesystem: %v", err)
	}
}
