// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// torn makes an image of many small parts, some of them far from the others.
func torn(t *testing.T, p *pool.Pool) *os.File {
	t.Helper()
	f, err := p.NewTemplate()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	block := bytes.Repeat([]byte("x"), 60<<10)
	for i := range int64(200) {
		if _, err := f.WriteAt(block, i/50*(32<<20)+i%50*(64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(200<<20), f.Sync()); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestPack packs an image that is in many pieces. Its content stays the same, and large holes stay
// holes. An image that is in few pieces is left alone.
func TestPack(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			f := torn(t, p)
			had, err := fiemap.Count(f)
			if err != nil || had < 100 {
				t.Fatalf("the image has only %d extents: %v", had, err)
			}
			before, err := digest(f)
			if err != nil {
				t.Fatal(err)
			}
			packed, has, err := pack(t.Context(), p.NewTemplate, f)
			if err != nil {
				t.Fatal(err)
			}
			defer packed.Close()
			t.Logf("%d extents became %d", had, has)
			if packed == f || has > fewExtents {
				t.Errorf("%d extents are left", has)
			}
			after, err := digest(packed)
			if err != nil || after != before {
				t.Errorf("the digest is %s, was %s: %v", after, before, err)
			}
			fi, err := packed.Stat()
			if err != nil || fi.Size() != 200<<20 {
				t.Errorf("it has %d bytes: %v", fi.Size(), err)
			}
			if took, err := fiemap.Unshared(packed); err != nil || took > 14<<20 {
				t.Errorf("it takes %d bytes: %v", took, err)
			}
			again, _, err := pack(t.Context(), p.NewTemplate, packed)
			if err != nil || again != packed {
				t.Errorf("an image of few extents was packed: %v", err)
			}
		})
	}
}

// TestPackFails ends in the middle, and in a pool that is full. The caller's file stays as it is.
func TestPackFails(t *testing.T) {
	p := newPool(t, testenv.XFS)
	f := torn(t, p)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := pack(ctx, p.NewTemplate, f); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	file, err := p.NewTemplate()
	if err != nil {
		t.Fatal(err)
	}
	testenv.Fill(t, p.CacheDir())
	if _, _, err := pack(t.Context(), func() (*os.File, error) { return file, nil }, f); !errors.Is(err, pool.ErrFull) {
		t.Errorf("a full pool: %v", err)
	}
	if n, err := f.ReadAt(make([]byte, 8<<10), 0); n != 8<<10 || err != nil {
		t.Errorf("the image has %d bytes: %v", n, err)
	}
}
