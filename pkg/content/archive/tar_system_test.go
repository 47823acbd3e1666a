//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/xattr"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// TestTar reads what tar(1) makes of a tree, in each of its formats.
func TestTar(t *testing.T) {
	dir := testenv.Dir(t)
	makeTree(t, filepath.Join(dir, "tree"))
	for _, flags := range [][]string{
		{"--format=gnu"}, {"--format=gnu", "--sparse"}, {"--format=pax", "--xattrs"}, {"--format=pax", "--sparse", "--sparse-version=0.0"},
		{"--format=pax", "--sparse", "--sparse-version=0.1"}, {"--format=pax", "--xattrs", "--sparse", "--sparse-version=1.0"},
		{"--format=gnu", "--gzip"}, {"--format=gnu", "--zstd"}, {"--format=gnu", "-P", "--sparse", "--transform=s,^tree,/tree,"},
	} {
		path := filepath.Join(dir, "archive")
		testenv.Run(t, "tar", append(append([]string{"-C", dir, "-cf", path}, flags...), "tree")...)
		s := summarize(t, path)
		stored := int64(64 * size.MiB)
		if slices.Contains(flags, "--sparse") {
			stored = 3 * 64 * size.KiB
		}
		if s.Entries != 9 || s.directories != 4 || s.links != 1 || s.symlinks != 1 || s.files != 3 {
			t.Errorf("%q: found %+v", flags, s)
		}
		if s.Bytes < stored || s.Bytes > stored+8*size.KiB {
			t.Errorf("%q: %d bytes, want some more than %d", flags, s.Bytes, stored)
		}
		if xattrs := slices.Contains(flags, "--xattrs"); xattrs != (s.carry == 1) {
			t.Errorf("%q: %d entries have attributes", flags, s.carry)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// makeTree makes a tree that has something of everything: 3 files, one of them sparse, 4 directories, 2 links.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(dir, name) }
	deep := strings.Repeat("d", 200) + "/" + strings.Repeat("e", 200)
	err := errors.Join(os.MkdirAll(in(deep), 0o755), os.Mkdir(in("bin"), 0o755),
		os.WriteFile(in(deep+"/deep"), []byte("deep"), 0o600), os.WriteFile(in("bin/hello"), []byte("hello"), 0o755),
		os.Chmod(in("bin/hello"), 0o755|os.ModeSetuid), os.Link(in("bin/hello"), in("bin/again")), os.Symlink("/bin/hello", in("link")))
	if err != nil {
		t.Fatal(err)
	}
	hello, err := os.Open(in("bin/hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer hello.Close()
	sparse, err := os.Create(in("sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer sparse.Close()
	err = errors.Join(xattr.Set(hello, "user.note", []byte("text")), sparse.Truncate(64*size.MiB))
	for _, at := range []int64{1, 5, 9} {
		_, writeErr := sparse.WriteAt(bytes.Repeat([]byte{1}, 64*size.KiB), at*size.MiB)
		err = errors.Join(err, writeErr)
	}
	if err != nil {
		t.Fatal(err)
	}
}
