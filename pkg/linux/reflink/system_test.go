//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package reflink

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
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

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestClone(t *testing.T) {
	for name, pool := range map[string]func(testing.TB) string{"btrfs": testenv.Btrfs.Pool, "xfs": testenv.XFS.Pool} {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			src := create(t, filepath.Join(dir, "src"))
			dst := create(t, filepath.Join(dir, "dst"))
			data := bytes.Repeat([]byte("template"), 1<<17)
			if _, err := src.WriteAt(data, 1<<20); err != nil {
				t.Fatal(err)
			}
			if err := Clone(dst, src); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(dst)
			if err != nil || !bytes.Equal(got, append(make([]byte, 1<<20), data...)) {
				t.Fatalf("the clone, of %d bytes, differs from its source: %v", len(got), err)
			}
			if _, err := dst.WriteAt([]byte("X"), 1<<20); err != nil {
				t.Fatal(err)
			}
			one := make([]byte, 1)
			if _, err := src.ReadAt(one, 1<<20); err != nil || one[0] != 't' {
				t.Errorf("after a write to the clone the source has %q: %v", one, err)
			}
			if err := Try(open(t, dir)); err != nil {
				t.Errorf("Try: %v", err)
			}
			if names, _ := os.ReadDir(dir); len(names) != 2 {
				t.Errorf("after Try the directory has %v", names)
			}
		})
	}
}

func TestCloneUnsupported(t *testing.T) {
	for name, pool := range map[string]func(testing.TB) string{
		"ext4":  testenv.Ext4.Pool,
		"tmpfs": testenv.Tmpfs,
		"xfs without reflink": func(t testing.TB) string {
			return testenv.Mount(t, 512<<20, "mkfs.xfs", "-q", "-m", "reflink=0")
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			src := create(t, filepath.Join(dir, "src"))
			dst := create(t, filepath.Join(dir, "dst"))
			if _, err := src.WriteString("template"); err != nil {
				t.Fatal(err)
			}
			err := Clone(dst, src)
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("Clone: %v", err)
			}
			t.Log(err)
			if info, err := dst.Stat(); err != nil || info.Size() != 0 {
				t.Errorf("%d bytes were copied: %v", info.Size(), err)
			}
			if err := Try(open(t, dir)); !errors.Is(err, ErrUnsupported) {
				t.Errorf("Try: %v", err)
			}
		})
	}
}

func TestCloneAcrossFilesystems(t *testing.T) {
	src := create(t, filepath.Join(testenv.XFS.Pool(t), "src"))
	dst := create(t, filepath.Join(testenv.XFS.Pool(t), "dst"))
	if err := Clone(dst, src); !errors.Is(err, syscall.EXDEV) || errors.Is(err, ErrUnsupported) {
		t.Errorf("Clone: %v", err)
	}
}

func TestCloneBetweenNoCOWAndCOW(t *testing.T) {
	dir := testenv.Btrfs.Pool(t)
	src := create(t, filepath.Join(dir, "src"))
	dst := create(t, filepath.Join(dir, "dst"))
	testenv.Run(t, "chattr", "+C", dst.Name())
	if _, err := src.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := Clone(dst, src); !errors.Is(err, syscall.EINVAL) || errors.Is(err, ErrUnsupported) {
		t.Errorf("Clone: %v", err)
	}
}

// TestCloneOnFullFilesystem: a full xfs refuses a clone whose mapping needs a block of
// its own.
func TestCloneOnFullFilesystem(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	src := create(t, filepath.Join(dir, "src"))
	// Every second block: more extents than fit into an inode.
	for i := range int64(20000) {
		if _, err := src.WriteAt([]byte{1}, i*8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := src.Sync(); err != nil {
		t.Fatal(err)
	}
	var dsts []*os.File // inodes need space too
	for i := range 100 {
		dsts = append(dsts, create(t, filepath.Join(dir, fmt.Sprint("dst", i))))
	}
	fill(t, create(t, filepath.Join(dir, "ballast")))
	for i, dst := range dsts {
		if err := Clone(dst, src); err != nil {
			if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrUnsupported) {
				t.Fatalf("clone %d: %v", i, err)
			}
			t.Logf("clone %d: %v", i, err)
			return
		}
	}
	t.Fatal("100 clones fit on a full filesystem")
}

func fill(t *testing.T, f *os.File) {
	t.Helper()
	for step := int64(64 << 20); step >= 4096; step /= 2 {
		for {
			end, err := f.Seek(0, io.SeekEnd)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Fallocate(int(f.Fd()), 0, end, step); err == syscall.ENOSPC {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}
