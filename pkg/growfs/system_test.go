// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package growfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
)

func attach(t *testing.T, image string) *loopdev.Device {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dev, err := new(loopdev.Allocator).Attach(f, loopdev.Options{AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

func TestGrow(t *testing.T) {
	testenv.Root(t)
	fs, err := diskfs.Lookup("ext4")
	if err != nil {
		t.Fatal(err)
	}
	args := fs.MkfsArgs("", "", nil)
	image := testenv.Image(t, 256<<20, append([]string{fs.Mkfs}, args[:len(args)-1]...)...)
	at := filepath.Join(filepath.Dir(image), "fs")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "-o", "loop", image, at)
	if err := os.WriteFile(filepath.Join(at, "file"), []byte("kept"), 0o600); err != nil {
		t.Error(err)
	}
	testenv.Umount(t, at)
	if err := os.Truncate(image, 1<<30); err != nil {
		t.Fatal(err)
	}
	dev := attach(t, image)
	err = Grow(t.Context(), fs, dev.Path())
	dev.Close()
	if err != nil {
		t.Fatal(err)
	}
	testenv.Fsck(t, "ext4", image)
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if sb, err := fs.Identify(f); err != nil || sb.Size != 1<<30 {
		t.Errorf("the filesystem is %+v: %v", sb, err)
	}
	testenv.Run(t, "mount", "-o", "loop,ro", image, at)
	defer testenv.Umount(t, at)
	if b, err := os.ReadFile(filepath.Join(at, "file")); string(b) != "kept" {
		t.Errorf("the file contains %q: %v", b, err)
	}
}

// TestGrowBroken grows an image that contains no filesystem.
func TestGrowBroken(t *testing.T) {
	testenv.Root(t)
	fs, err := diskfs.Lookup("ext4")
	if err != nil {
		t.Fatal(err)
	}
	dev := attach(t, testenv.Image(t, 64<<20))
	defer dev.Close()
	err = Grow(t.Context(), fs, dev.Path())
	t.Log(err)
	if !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "e2fsck") || !strings.Contains(err.Error(), "superblock") {
		t.Errorf("the error does not say what failed: %v", err)
	}
}
