// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package fsctl

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
)

var mkfs = map[string][]string{
	"btrfs": {"mkfs.btrfs", "-q"},
	"ext4":  {"mkfs.ext4", "-q", "-b", "4096"},
	"xfs":   {"mkfs.xfs", "-q", "-s", "size=4096"},
}

// mounted mounts a filesystem of 300 MiB from a loop device with blocks of 4 KiB.
func mounted(t *testing.T, name string) (root *os.File, image string, dev *loopdev.Device) {
	t.Helper()
	testenv.Root(t)
	image = testenv.Image(t, 300<<20, mkfs[name]...)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if dev, err = new(loopdev.Allocator).Attach(f, loopdev.Options{AutoClear: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	at := filepath.Join(filepath.Dir(image), "fs")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", dev.Path(), at)
	t.Cleanup(func() { testenv.Unmount(t, at) })
	if root, err = os.Open(at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, image, dev
}

func TestFreeze(t *testing.T) {
	for name := range mkfs {
		t.Run(name, func(t *testing.T) {
			root, _, _ := mounted(t, name)
			if err := Thaw(root); err != nil {
				t.Errorf("thawing a filesystem that is not frozen: %v", err)
			}
			if err := errors.Join(Sync(root), Freeze(root)); err != nil {
				t.Fatal(err)
			}
			defer Thaw(root)
			if err := Freeze(root); !errors.Is(err, ErrFrozen) {
				t.Errorf("freezing it again: %v", err)
			}
			written := make(chan error, 1)
			go func() { written <- os.WriteFile(filepath.Join(root.Name(), "file"), []byte("x"), 0o600) }()
			select {
			case err := <-written:
				t.Errorf("a write to a frozen filesystem returned: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			if err := Thaw(root); err != nil {
				t.Fatal(err)
			}
			if err := <-written; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestGrow(t *testing.T) {
	for name := range mkfs {
		t.Run(name, func(t *testing.T) {
			root, image, dev := mounted(t, name)
			var before, after syscall.Statfs_t
			const size = 600 << 20
			if err := errors.Join(syscall.Statfs(root.Name(), &before), os.Truncate(image, size), dev.UpdateSize()); err != nil {
				t.Fatal(err)
			}
			err := Grow(root, size)
			if may := MayGrow(name); may != nil {
				t.Log(may, err)
				if !errors.Is(may, ErrNotPermitted) || !errors.Is(err, ErrNotPermitted) {
					t.Errorf("MayGrow: %v; Grow: %v; both must be ErrNotPermitted", may, err)
				}
				return
			}
			if err == nil {
				err = syscall.Statfs(root.Name(), &after)
			}
			if err != nil {
				t.Fatal(err)
			}
			if grown := int64(after.Blocks-before.Blocks) * after.Bsize; grown < 250<<20 {
				t.Errorf("it grew by %d bytes, want 300 MiB less the metadata", grown)
			}
			if err := Grow(root, size); err != nil {
				t.Errorf("growing it again: %v", err)
			}
		})
	}
}

func TestGrowUnknown(t *testing.T) {
	dir := testenv.Tmpfs(t)
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Grow(f, 1<<30); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("growing a tmpfs: %v", err)
	}
}
