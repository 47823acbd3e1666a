// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"errors"
	"testing"
)

// FuzzInspect: a file is refused, or has a size within the bounds.
func FuzzInspect(f *testing.F) {
	f.Add(header(f, nil))
	f.Add(header(f, func(h *qcow2Header) { h.Version = 2 }))
	f.Add(header(f, nil, extension(extensionExternalData, "x")...))
	f.Add([]byte("conectix"))
	f.Fuzz(func(t *testing.T, b []byte) {
		format, virtual, err := inspect(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if !errors.Is(err, ErrUnusable) {
				t.Fatal(err)
			}
			return
		}
		if virtual < sector || virtual > maxSize || virtual%sector != 0 {
			t.Fatalf("a %s disk has %d bytes", format, virtual)
		}
		if format == Qcow2 && (b[8]|b[9]|b[10]|b[11]|b[12]|b[13]|b[14]|b[15]) != 0 {
			t.Fatal("it has a backing file")
		}
	})
}

// FuzzFind: layers have one disk, or are refused, and no descriptor is left.
func FuzzFind(f *testing.F) {
	f.Add(layer(f, "disk/", "disk/a=x"), layer(f, "disk/.wh.a=", "disk/b=y"))
	f.Add(layer(f, "disk/a/b=x"), layer(f, "disk/a=y"))
	f.Add(layer(f, "disk/a->x"), layer(f, ".wh..wh..opq="))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		file, path, err := Find(t.Context(), dir, 1<<20, bytes.NewReader(lower), bytes.NewReader(upper))
		if err != nil {
			if !errors.Is(err, ErrUnusable) {
				t.Fatal(err)
			}
			return
		}
		defer file.Close()
		if !below(path, place) {
			t.Fatalf("found %q", path)
		}
	})
}
