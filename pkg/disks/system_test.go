// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package disks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// formatted makes a source in a directory, without a VM.
func formatted(t testing.TB, dir, filesystem string, size int64) Source {
	t.Helper()
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "source"))
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	testenv.Run(t, fs.Mkfs, fs.MkfsArgs(f.Name(), "", nil)...)
	return Source{File: f, Spec: diskfs.Spec{Filesystem: filesystem, Size: size}}
}

func paths(dir string, n int) (all []string) {
	for i := range n {
		all = append(all, filepath.Join(dir, fmt.Sprintf("disk-%d", i)))
	}
	return all
}

// TestMake makes disks of each filesystem on each: clones where that is possible.
func TestMake(t *testing.T) {
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Btrfs, testenv.Ext4} {
		dir := kind.Mount(t, 2<<30)
		for filesystem, size := range map[string]int64{"ext4": 64 << 20, "xfs": 300 << 20, "btrfs": 128 << 20} {
			t.Run(filesystem+" on "+kind.Name, func(t *testing.T) {
				s := formatted(t, dir, filesystem, size)
				made, err := s.Make(t.Context(), paths(dir, 9), true)
				if err != nil || len(made) != 9 {
					t.Fatalf("%d were made: %v", len(made), err)
				}
				ids := map[uuid.UUID]bool{}
				for i, m := range made {
					ids[m.UUID] = true
					clone := kind.Name != "ext4"
					if m.Path != paths(dir, 9)[i] || (m.Copied == "") != clone || (m.Shares > 0) != clone || m.Takes == 0 {
						t.Errorf("disk %d is %+v", i, m)
					}
					testenv.Fsck(t, filesystem, m.Path)
				}
				if len(ids) != 9 {
					t.Errorf("they have %d UUIDs", len(ids))
				}
			})
		}
	}
}

// TestPublish: a name is taken from nobody, unless that was asked for, and never from what is not a file.
func TestPublish(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	s := Source{Spec: diskfs.Spec{Filesystem: diskfs.Disk, Size: 1 << 20}}
	taken, link := filepath.Join(dir, "taken"), filepath.Join(dir, "link")
	sub, free := filepath.Join(dir, "sub"), filepath.Join(dir, "free")
	if err := errors.Join(
		os.WriteFile(taken, []byte("old"), 0o600), os.Symlink("nowhere", link), os.Mkdir(sub, 0o700),
	); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{taken, link, sub} {
		if made, err := s.Make(t.Context(), []string{path}, false); !errors.Is(err, os.ErrExist) || len(made) > 0 {
			t.Errorf("%s: %v, %v", path, made, err)
		}
	}
	if b, err := os.ReadFile(taken); err != nil || string(b) != "old" {
		t.Errorf("the file has %q: %v", b, err)
	}
	for _, path := range []string{link, sub} {
		if made, err := s.Make(t.Context(), []string{path}, true); !errors.Is(err, os.ErrExist) || len(made) > 0 {
			t.Errorf("replacing %s: %v, %v", path, made, err)
		}
	}
	made, err := s.Make(t.Context(), []string{taken, free}, true)
	if err != nil || len(made) != 2 {
		t.Fatalf("%v, %v", made, err)
	}
	for _, path := range []string{taken, free} {
		if fi, err := os.Stat(path); err != nil || fi.Size() != 1<<20 || fi.Mode() != 0o644 {
			t.Errorf("%v, %v", fi, err)
		}
	}
}

// TestWholeDisk: the rest of a larger one is empty, and a smaller one is refused.
func TestWholeDisk(t *testing.T) {
	dir := testenv.Ext4.Pool(t)
	f, err := os.Create(filepath.Join(dir, "source"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := bytes.Repeat([]byte("disk"), 3<<18)
	if _, err := f.Write(want); err != nil {
		t.Fatal(err)
	}
	for size, has := range map[int64]int64{0: 3 << 20, 3 << 20: 3 << 20, 5 << 20: 5 << 20} {
		s := Source{File: f, Spec: diskfs.Spec{Filesystem: diskfs.Disk, Size: size, Content: "vm"}}
		made, err := s.Make(t.Context(), paths(dir, 1), true)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(made[0].Path)
		if err != nil || !bytes.Equal(b, append(slices.Clone(want), make([]byte, has-3<<20)...)) {
			t.Errorf("with the size %d it has %d bytes: %v", size, len(b), err)
		}
	}
	small := Source{File: f, Spec: diskfs.Spec{Filesystem: diskfs.Disk, Size: 2 << 20}}
	if _, err := small.New(t.Context(), dir); !errors.Is(err, ErrTooSmall) {
		t.Errorf("a smaller one: %v", err)
	}
}

// TestMakeStops: those that were made are reported, and the directory has no other ones.
func TestMakeStops(t *testing.T) {
	small := testenv.Ext4.Mount(t, 64<<20)
	s := formatted(t, testenv.Dir(t), "btrfs", 128<<20)
	canceled, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if made, err := s.Make(canceled, paths(small, 3), false); !errors.Is(err, enough) || len(made) > 0 {
		t.Errorf("a context that has ended: %v, %v", made, err)
	}
	made, err := s.Make(t.Context(), paths(small, 500), false)
	entries, readErr := filepath.Glob(filepath.Join(small, "disk-*"))
	if !errors.Is(err, syscall.ENOSPC) || len(made) == 0 || readErr != nil || len(entries) != len(made) {
		t.Errorf("%d were made, there are %d: %v", len(made), len(entries), err)
	}
	for _, dir := range []string{filepath.Join(small, "missing"), "/proc/self"} {
		if _, err := s.New(t.Context(), dir); !errors.Is(err, ErrUnusable) {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

// BenchmarkMake makes 200 disks of 1 GiB, without the VM that formats the first.
func BenchmarkMake(b *testing.B) {
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Btrfs, testenv.Ext4} {
		b.Run("ext4 on "+kind.Name, func(b *testing.B) {
			dir := kind.Mount(b, 4<<30)
			s := formatted(b, dir, "ext4", 1<<30)
			for b.Loop() {
				if _, err := s.Make(b.Context(), paths(dir, 200), true); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/1e3/float64(b.N)/200, "ms/disk")
		})
	}
}
