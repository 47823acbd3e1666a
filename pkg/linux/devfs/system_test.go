// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package devfs

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestInOwnDev opens nodes, and uses their paths, where /dev is an empty tmpfs.
func TestInOwnDev(t *testing.T) {
	testenv.InOwnDev(t, func() {
		const path = "/dev/loop-control"
		f, err := Open("loop-control", unix.O_RDWR)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		want, err := Stat(path)
		if err != nil || want.Mode&unix.S_IFMT != unix.S_IFCHR || f.Name() != path {
			t.Errorf("%s: the mode of %s is %#o: %v", f.Name(), path, want.Mode, err)
		}
		at := func() (st unix.Stat_t, err error) {
			err = At(path, func() error { return unix.Stat(path, &st) })
			return st, err
		}
		if got, err := at(); err != nil || got.Ino != want.Ino {
			t.Errorf("without a node here: %v", err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Error(err)
		}
		if got, err := at(); err != nil || got.Ino != want.Ino {
			t.Errorf("with another file here: %v", err)
		}
	})
}

// TestHere: where /dev is the kernel's devtmpfs, the path is used on the caller's own thread.
func TestHere(t *testing.T) {
	here := func(path string) bool {
		same := false
		if err := At(path, func() error {
			var st unix.Stat_t
			same = unix.Stat("/proc/self", &st) == nil // the other namespace has no /proc
			return nil
		}); err != nil {
			t.Error(err)
		}
		return same
	}
	for _, path := range []string{"/dev/loop-control", "/dev/no-such-device", "/elsewhere", ""} {
		if !here(path) {
			t.Errorf("%q is used in another mount namespace", path)
		}
	}
}

// TestMissing: a device that does not exist is one that was removed.
func TestMissing(t *testing.T) {
	if _, err := Open("no-such-device", unix.O_RDONLY); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open: %v", err)
	}
	for _, path := range []string{"/dev/no-such-device", "/var/tmp/no-such-file"} {
		if _, err := Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Stat %s: %v", path, err)
		}
	}
	if st, err := Stat("/var/tmp"); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("Stat of a path outside of /dev: %v", err)
	}
}

// TestKeepsNothing: the other mount namespace holds a root, a /dev and nothing else. Copies of
// other mounts would keep volumes alive after they were unmounted.
func TestKeepsNothing(t *testing.T) {
	var names []string
	testenv.InOwnDev(t, func() {
		err := At("/dev/loop-control", func() error {
			entries, err := os.ReadDir("/")
			for _, e := range entries {
				names = append(names, e.Name())
			}
			return errors.Join(err, unix.Access("/dev/../../proc/self", unix.F_OK))
		})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("there is a /proc: %v", err)
		}
	})
	if len(names) != 1 || names[0] != "dev" {
		t.Errorf("the root has %q, want dev alone", names)
	}
}

// BenchmarkOpen opens a node by its path, as before there was this package, and here.
func BenchmarkOpen(b *testing.B) {
	b.Run("path", func(b *testing.B) {
		for b.Loop() {
			fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				b.Fatal(err)
			}
			unix.Close(fd)
		}
	})
	b.Run("here", func(b *testing.B) {
		for b.Loop() {
			f, err := Open("null", unix.O_RDONLY)
			if err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	})
}
