// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
	"unicode/utf8"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// FuzzAdd reads archives. What is accepted is within the limits, can be read where it was written, and has
// nothing in it that is refused. What is refused is said briefly.
func FuzzAdd(f *testing.F) {
	good := pack(f, &tar.Header{Name: "./", Typeflag: tar.TypeDir}, &tar.Header{Name: "/a", Size: 10, Mode: 0o6755},
		&tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: "a"}, &tar.Header{Name: ".wh..wh..opq"},
		&tar.Header{Name: "c", Typeflag: tar.TypeSymlink, Linkname: "/etc"},
		&tar.Header{Name: "d", PAXRecords: map[string]string{xattrRecord + "user.a": "v"}})
	for _, src := range [][]byte{
		{}, good, gzipped(f, good), zstandard(f, good), window(f), sparseEntry(f, 1<<40), good[:700],
		pack(f, &tar.Header{Name: "../a", Typeflag: tar.TypeLink, Linkname: "../../b"}, &tar.Header{Name: "n", Typeflag: tar.TypeBlock}),
		retyped(pack(f, &tar.Header{Name: "a", Size: 512}), tar.TypeGNUSparse),
	} {
		f.Add(src)
	}
	limits := Limits{Bytes: 4 * size.MiB, Entries: 1000, Ratio: 100}
	f.Fuzz(func(t *testing.T, src []byte) {
		dst, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer dst.Close()
		w := NewWriter(dst, limits)
		layer, err := w.Add(t.Context(), bytes.NewReader(src))
		if err != nil {
			judgeError(t, err)
			return
		}
		s := w.Summary()
		if layer.Offset != 0 || layer.Length > limits.Bytes || s.Entries+s.implicit > limits.Entries || s.Bytes < 0 || s.blocks < 0 {
			t.Errorf("%+v has %+v", layer, s)
		}
		for _, filesystem := range []string{"ext4", "xfs", "btrfs"} {
			if s.Needs(filesystem, nil, 0) < s.Bytes/2 {
				t.Errorf("%s would need %d bytes for %d", filesystem, s.Needs(filesystem, nil, 0), s.Bytes)
			}
		}
		if n := members(t, io.NewSectionReader(dst, layer.Offset, layer.Length)); n != s.Entries {
			t.Errorf("%d entries, written are %d", s.Entries, n)
		}
	})
}

func judgeError(t *testing.T, err error) {
	t.Helper()
	text := err.Error()
	if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrRefused) && !errors.Is(err, ErrLimit) {
		t.Errorf("none of the errors: %v", err)
	}
	if !utf8.ValidString(text) || len(text) > 3000 {
		t.Errorf("%.1000q", text)
	}
	for _, fault := range plain.Faults(text) {
		t.Errorf("%s: %s", fault, text)
	}
}

// members counts what a plain archive has, and checks the paths once more.
func members(t *testing.T, r io.Reader) (n int64) {
	t.Helper()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return n
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		n++
		if _, err := new(scanner).check(h); err != nil {
			t.Errorf("entry %q %v", h.Name, err)
		}
	}
}
