// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package sparse

import (
	"bytes"
	"os"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestCopyBegin copies the beginning of a file. The size may be in a hole, within data, or
// behind the end.
func TestCopyBegin(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Pool(t)
			src := create(t, dir, "src", 50<<30)
			for _, at := range []int64{0, 4 << 20, 8 << 20} {
				if _, err := src.WriteAt(bytes.Repeat([]byte{'x'}, 2<<20), at); err != nil {
					t.Fatal(err)
				}
			}
			for name, size := range map[string]int64{"hole": 3 << 20, "data": 5<<20 + 100, "start-of-data": 8 << 20, "all": 16 << 20, "nothing": 0} {
				dst := create(t, dir, name, size)
				if err := CopyBegin(t.Context(), dst, src, size); err != nil {
					t.Error(err)
				}
				want := make([]byte, size)
				if _, err := src.ReadAt(want, 0); err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(dst.Name()); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, want %d, or their content differs: %v", name, len(got), size, err)
				}
			}
		})
	}
}

func TestSetLength(t *testing.T) {
	f := create(t, testenv.Tmpfs(t), "f", 0)
	for _, size := range []int64{100, 100, 1 << 30, 1, 0} {
		if err := SetLength(f, size); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(f.Name()); err != nil || fi.Size() != size {
			t.Errorf("%d bytes, want %d: %v", fi.Size(), size, err)
		}
	}
	if err := SetLength(f, -1); err == nil {
		t.Error("a negative length was accepted")
	}
}
