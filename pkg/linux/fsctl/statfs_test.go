// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStatus(t *testing.T) {
	proc, err := os.Open("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	at, errAt := StatusAt("/proc")
	of, errOf := StatusOf(proc)
	if err := errors.Join(errAt, errOf); err != nil {
		t.Fatal(err)
	}
	if at.Identity != of.Identity || at.Type != unix.PROC_SUPER_MAGIC {
		t.Errorf("/proc is %+v by its path and %+v by its descriptor", at, of)
	}
	here, err := StatusAt(t.TempDir())
	if err != nil || here.Identity == at.Identity || here.Total < here.Available || here.BlockSize <= 0 || here.ReadOnly {
		t.Errorf("the directory of this test: %+v, %v", here, err)
	}
	if _, err := StatusAt("/nonexistent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a path that does not exist: %v", err)
	}
}

func TestType(t *testing.T) {
	for kind, want := range map[Type]struct {
		name   string
		shared bool
	}{
		Btrfs:                 {"btrfs", false},
		unix.NFS_SUPER_MAGIC:  {"nfs", true},
		unix.FUSE_SUPER_MAGIC: {"a filesystem", true},
		unix.PROC_SUPER_MAGIC: {"a filesystem", false},
	} {
		if kind.Name() != want.name || kind.MayBeShared() != want.shared {
			t.Errorf("f_type %#x: %q, may be shared: %v; want %+v", int64(kind), kind.Name(), kind.MayBeShared(), want)
		}
	}
}
