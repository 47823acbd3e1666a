// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

func create(t *testing.T, dir, name string, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func blocks(t *testing.T, f *os.File) int64 {
	t.Helper()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestSparse(t *testing.T) {
	const size = 64 << 20
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Pool(t)
			src := create(t, dir, "src", size)
			want := bytes.Repeat([]byte("data"), 3<<20/4)
			at := []int64{0, 16 << 20, size - int64(len(want))}
			for _, off := range at {
				if _, err := src.WriteAt(want, off); err != nil {
					t.Fatal(err)
				}
			}
			var found []Extent
			for e, err := range Data(src) {
				if err != nil {
					t.Fatal(err)
				}
				found = append(found, e)
			}
			if expect := []Extent{{0, 3 << 20}, {16 << 20, 19 << 20}, {61 << 20, 64 << 20}}; !slices.Equal(found, expect) {
				t.Errorf("the data is in %v, want %v", found, expect)
			}

			dst := create(t, dir, "dst", 0)
			if err := errors.Join(Reserve(dst, size), Copy(t.Context(), dst, src)); err != nil {
				t.Fatal(err)
			}
			a, errA := os.ReadFile(src.Name())
			b, errB := os.ReadFile(dst.Name())
			if err := errors.Join(errA, errB); err != nil || !bytes.Equal(a, b) {
				t.Errorf("the copy differs from its source: %v", err)
			}
			if n := blocks(t, dst); n < size {
				t.Errorf("%d bytes are reserved, want %d", n, size)
			}

			// Reserving again fills a hole and loses no content.
			if err := syscall.Fallocate(int(dst.Fd()), 0x3 /* PUNCH_HOLE|KEEP_SIZE */, 20<<20, 8<<20); err != nil {
				t.Fatal(err)
			}
			if n := blocks(t, dst); n >= size {
				t.Errorf("with a hole of 8 MiB, %d bytes are reserved", n)
			}
			if err := Reserve(dst, size); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(dst.Name()); err != nil || !bytes.Equal(a, b) || blocks(t, dst) < size {
				t.Errorf("after reserving again, %d bytes are reserved, or the content changed: %v", blocks(t, dst), err)
			}

			if err := Reserve(create(t, dir, "too-large", 0), 1<<40); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("reserving more than the filesystem has: %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if err := Copy(ctx, dst, src); !errors.Is(err, context.Canceled) {
				t.Errorf("copying with a canceled context: %v", err)
			}
		})
	}
}
