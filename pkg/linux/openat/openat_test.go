// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package openat

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDirectoryStaysTheSame moves the directory away and puts another in its place.
func TestDirectoryStaysTheSame(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir")
	file := filepath.Join(path, "sub", "file")
	lay := func(content string) error {
		return errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte(content), 0o600))
	}
	if err := lay("ours"); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := errors.Join(os.Rename(path, path+"2"), lay("another")); err != nil {
		t.Fatal(err)
	}
	f, err := Open(dir, "sub/file", syscall.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != "ours" {
		t.Errorf("opened %q: %v", b, err)
	}
	if err := Remove(dir, "sub"); !errors.Is(err, syscall.EISDIR) {
		t.Errorf("removing a directory: %v", err)
	}
	for range 2 {
		if err := Remove(dir, "sub/file"); err != nil {
			t.Error(err)
		}
		if _, err := Open(dir, "sub/file", syscall.O_RDONLY); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("opening a removed file: %v", err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "another" {
		t.Errorf("the file in the other directory has %q: %v", b, err)
	}
}

// TestStat compares the status of files with what package os says of them.
func TestStat(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	path := func(name string) string { return filepath.Join(dir.Name(), name) }
	if err := errors.Join(os.WriteFile(path("file"), make([]byte, 10000), 0o600), os.Symlink("file", path("link"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "link", "."} {
		fi, err := os.Lstat(path(name))
		if err != nil {
			t.Fatal(err)
		}
		st := fi.Sys().(*syscall.Stat_t)
		want := Status{
			Device: st.Dev, Inode: st.Ino, Changed: time.Unix(st.Ctim.Unix()), Modified: time.Unix(st.Mtim.Unix()),
			Regular: fi.Mode().IsRegular(), Size: st.Size, Allocated: st.Blocks * 512,
		}
		if got, err := Stat(dir, name); err != nil || got != want {
			t.Errorf("%s: %+v, not %+v: %v", name, got, want, err)
		}
	}
	if _, err := Stat(dir, "missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that does not exist: %v", err)
	}
}

// TestOpenWaitsForLeases: a lease of another makes an opener with O_NONBLOCK wait, and not for
// ever.
func TestOpenWaitsForLeases(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	held, err := os.Create(filepath.Join(dir.Name(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	lease := func(kind int) {
		if _, err := unix.FcntlInt(held.Fd(), unix.F_SETLEASE, kind); err != nil {
			t.Errorf("F_SETLEASE %d: %v", kind, err)
		}
	}
	lease(unix.F_WRLCK)
	if f, err := Open(dir, "file", unix.O_RDONLY|unix.O_NONBLOCK); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("Open of a file with a lease: %v, %v", f, err)
	}
	dropped := make(chan struct{})
	time.AfterFunc(50*time.Millisecond, func() {
		defer close(dropped)
		lease(unix.F_UNLCK)
	})
	f, err := Open(dir, "file", unix.O_RDONLY|unix.O_NONBLOCK)
	<-dropped
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}
