// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package sparse

import (
	"bytes"
	"errors"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestCopyRange copies a range with a hole in it. The copy has zeros there, over what was there
// before, and nothing beside the range changes.
func TestCopyRange(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	src, dst := create(t, dir, "src", 4<<20), create(t, dir, "dst", 0)
	_, err := src.WriteAt(bytes.Repeat([]byte{'x'}, 1<<20), 1<<20)
	_, err2 := dst.WriteAt(bytes.Repeat([]byte{'y'}, 4<<20), 0)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	if err := CopyRange(t.Context(), dst, src, Extent{1<<20 + 1, 3<<20 + 1}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4<<20)
	if _, err := dst.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	part := func(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }
	want := bytes.Join([][]byte{part('y', 1<<20+1), part('x', 1<<20-1), part(0, 1<<20+1), part('y', 1<<20-1)}, nil)
	if !bytes.Equal(got, want) {
		t.Error("the copy has not the range of its source between what it had")
	}
	if blocks(t, dst) < 4<<20 {
		t.Errorf("the hole takes no space: %d bytes are allocated", blocks(t, dst))
	}
}
