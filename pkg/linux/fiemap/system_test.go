// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package fiemap

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestCount(t *testing.T) {
	for name, pool := range map[string]func(testing.TB) string{"btrfs": testenv.Btrfs.Pool, "xfs": testenv.XFS.Pool, "ext4": testenv.Ext4.Pool} {
		t.Run(name, func(t *testing.T) {
			f := create(t, filepath.Join(pool(t), "f"))
			if n, err := Count(f); n != 0 || err != nil {
				t.Fatalf("an empty file has %d extents: %v", n, err)
			}
			if err := f.Truncate(8 << 20); err != nil {
				t.Fatal(err)
			}
			for i := range int64(5) {
				if _, err := f.WriteAt([]byte{1}, i<<20); err != nil {
					t.Fatal(err)
				}
			}
			// Delayed allocation: without the sync there is nothing to count.
			if n, err := Count(f); n != 5 || err != nil {
				t.Errorf("a file with five blocks far apart has %d extents: %v", n, err)
			}
		})
	}
	if _, err := Count(create(t, filepath.Join(testenv.Tmpfs(t), "f"))); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Count on tmpfs: %v", err)
	}
}

// TestExtents reads what a file has at its extents' places in the file behind the loop
// device: a physical address is an offset there. More extents than one call returns.
func TestExtents(t *testing.T) {
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Ext4} {
		t.Run(kind.Name, func(t *testing.T) {
			image := filepath.Join(testenv.Dir(t), "image")
			kind.Format(t, image, 512<<20)
			at := testenv.Dir(t)
			testenv.Run(t, "mount", "-o", "loop", image, at)
			t.Cleanup(func() { testenv.Unmount(t, at) })
			f := create(t, filepath.Join(at, "f"))
			const blocks, gap, size = 3 * atOnce, 1 << 16, 4096
			content := func(i int64) []byte { return bytes.Repeat(fmt.Appendf(nil, "%07d,", i), size/8) }
			if err := f.Truncate(blocks * gap); err != nil { // xfs reserves space behind a growing file
				t.Fatal(err)
			}
			for i := range int64(blocks) {
				if _, err := f.WriteAt(content(i), i*gap); err != nil {
					t.Fatal(err)
				}
			}
			const reserved = 1 << 20 // behind the blocks; never written
			if err := syscall.Fallocate(int(f.Fd()), 0, blocks*gap, reserved); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "sync", "-f", at)
			backing, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer backing.Close()
			seen, space := 0, int64(0)
			for e, err := range Extents(f, 0, blocks*gap+reserved) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Logical >= blocks*gap {
					space += e.Length
					continue
				}
				got := make([]byte, size)
				if _, err := backing.ReadAt(got, e.Physical); err != nil || !bytes.Equal(got, content(e.Logical/gap)) {
					t.Errorf("%+v: the image has %.16q there: %v", e, got, err)
				}
				seen++
			}
			if seen != blocks || space < reserved {
				t.Errorf("%d extents with data, want %d, and %d bytes reserved, want %d", seen, blocks, space, reserved)
			}
			// A range has the extents that overlap it.
			n := 0
			for e, err := range Extents(f, 2*gap+1, 5*gap+1) {
				if n++; err != nil || e.Logical < 2*gap || e.Logical > 5*gap {
					t.Errorf("%+v: %v", e, err)
				}
			}
			if n != 4 {
				t.Errorf("%d extents overlap the range, want 4", n)
			}
		})
	}
}

// TestUnshared measures a file of several hundred extents, more than one call returns, of which
// a clone shares some.
func TestUnshared(t *testing.T) {
	for name, pool := range map[string]func(testing.TB) string{"btrfs": testenv.Btrfs.Pool, "xfs": testenv.XFS.Pool} {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			src := create(t, filepath.Join(dir, "src"))
			is := func(what string, want int64) {
				t.Helper()
				if got, err := Unshared(src); err != nil || got != want {
					t.Errorf("%s: %d bytes are not shared, want %d: %v", what, got, want, err)
				}
			}
			is("an empty file", 0)
			const pieces, piece = 400, 8192
			if err := src.Truncate(pieces * 2 * piece); err != nil { // xfs preallocates behind a file that grows
				t.Fatal(err)
			}
			data := bytes.Repeat([]byte{7}, piece)
			for i := range int64(pieces) {
				if _, err := src.WriteAt(data, i*2*piece); err != nil {
					t.Fatal(err)
				}
			}
			is("a file", pieces*piece)
			dst := create(t, filepath.Join(dir, "dst"))
			if err := reflink.Clone(dst, src); err != nil {
				t.Fatal(err)
			}
			is("a file with a clone", 0)
			for i := range int64(100) {
				if _, err := dst.WriteAt(data, i*2*piece); err != nil {
					t.Fatal(err)
				}
			}
			if err := dst.Sync(); err != nil {
				t.Fatal(err)
			}
			is("a file with a clone that was written to", 100*piece)
		})
	}
}
