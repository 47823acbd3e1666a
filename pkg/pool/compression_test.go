// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package pool

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

// TestCompressedDirectory: btrfs refuses NOCOW on a directory with the property "compression",
// which directories inherit.
func TestCompressedDirectory(t *testing.T) {
	for _, value := range []string{"zstd", "lzo", "none"} {
		t.Run(value, func(t *testing.T) {
			dir := filepath.Join(testenv.Btrfs.Mount(t, 400<<20), "pool")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "btrfs", "property", "set", dir, "compression", value)
			p := mustOpen(t, Config{Dir: dir})
			mustShareUncompressed(t, p)
			if got := testenv.Run(t, "btrfs", "property", "get", dir, "compression"); !strings.Contains(got, value) {
				t.Errorf("the property of the directory itself was changed: %q", got)
			}
			mustOpen(t, Config{Dir: dir})
		})
	}
}

// TestCompressedMount: the mount option is no property, and NOCOW overrides it.
func TestCompressedMount(t *testing.T) {
	for _, option := range []string{"compress=zstd", "compress-force=zstd"} {
		t.Run(option, func(t *testing.T) {
			at := testenv.Btrfs.Mount(t, 400<<20)
			testenv.Run(t, "mount", "-o", "remount,"+option, at)
			mustShareUncompressed(t, mustOpen(t, Config{Dir: filepath.Join(at, "pool")}))
		})
	}
}

// mustShareUncompressed checks that images are not copy-on-write, not compressed, and can be
// cloned.
func mustShareUncompressed(t *testing.T, p *Pool) {
	t.Helper()
	for _, name := range imageDirs {
		if flags, err := flagsOf(filepath.Join(p.root, name)); err != nil || flags&(fsctl.NoCOW|fsctl.Compression) != fsctl.NoCOW {
			t.Errorf("the flags of %s are %#x: %v", name, flags, err)
		}
	}
	src, err := p.NewTemplate()
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if _, err := src.Write(make([]byte, 4<<20)); err != nil {
		t.Fatal(err)
	}
	if err := src.Sync(); err != nil {
		t.Fatal(err)
	}
	// Compressed zeros would take a few blocks.
	if fi, err := src.Stat(); err != nil || fi.Sys().(*syscall.Stat_t).Blocks < 4<<20/512 {
		t.Errorf("4 MiB take less, so they are compressed: %v", err)
	}
	dst, err := p.NewVolume()
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if err := reflink.Clone(dst, src); err != nil {
		t.Error(err)
	}
	if err := useTrial(dst); err != nil {
		t.Error(err)
	}
}

// TestCompressedImages: a directory with images keeps the property, which its images have too.
func TestCompressedImages(t *testing.T) {
	dir := filepath.Join(testenv.Btrfs.Mount(t, 400<<20), "pool")
	for _, name := range imageDirs {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(at, 0o700); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "btrfs", "property", "set", at, "compression", "zstd")
		if err := os.WriteFile(filepath.Join(at, "image"), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mustOpen(t, Config{Dir: dir})
	for _, name := range imageDirs {
		if err := os.Remove(filepath.Join(dir, name, "image")); err != nil {
			t.Fatal(err)
		}
	}
	mustShareUncompressed(t, mustOpen(t, Config{Dir: dir})) // as the message says
}
