// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

// layer makes a tar archive of entries: "name=content" is a file, "name/" a directory, "name->target" a link.
func layer(t testing.TB, entries ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		h := &tar.Header{Mode: 0o644, Typeflag: tar.TypeReg}
		var content string
		if name, target, ok := strings.Cut(e, "->"); ok {
			h.Name, h.Linkname, h.Typeflag = name, target, tar.TypeSymlink
		} else if strings.HasSuffix(e, "/") {
			h.Name, h.Typeflag = e, tar.TypeDir
		} else {
			h.Name, content, _ = strings.Cut(e, "=")
			h.Size = int64(len(content))
		}
		err := w.WriteHeader(h)
		if err == nil {
			_, err = io.WriteString(w, content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestFind(t *testing.T) {
	var many []string
	for c := 'a'; c < 'z'; c++ {
		many = append(many, "disk/"+string(c)+"=x")
	}
	one := layer(t, "disk/", "disk/a.img=first")
	for name, tc := range map[string]struct {
		layers [][]byte
		want   string // NAME=CONTENT
		words  string
	}{
		"one":                  {[][]byte{one}, "/disk/a.img=first", ""},
		"beside others":        {[][]byte{layer(t, "etc/passwd=x", "./disk/a.img=first", "disk2/b=")}, "/disk/a.img=first", ""},
		"deeper":               {[][]byte{layer(t, "disk/x/", "disk/x/a=first")}, "/disk/x/a=first", ""},
		"above":                {[][]byte{one, layer(t, "disk/a.img=second")}, "/disk/a.img=second", ""},
		"twice":                {[][]byte{layer(t, "disk/a=first", "disk/a=second")}, "/disk/a=second", ""},
		"whiteout":             {[][]byte{one, layer(t, "disk/b=second", "disk/.wh.a.img=")}, "/disk/b=second", ""},
		"whiteout of all":      {[][]byte{one, layer(t, ".wh.disk=", "disk/b=second")}, "/disk/b=second", ""},
		"opaque":               {[][]byte{one, layer(t, "disk/b=second", "disk/.wh..wh..opq=")}, "/disk/b=second", ""},
		"opaque root":          {[][]byte{one, layer(t, ".wh..wh..opq=", "disk/b=second")}, "/disk/b=second", ""},
		"another whiteout":     {[][]byte{one, layer(t, ".wh.diskette=", "disk/.wh.a=")}, "/disk/a.img=first", ""},
		"link replaced":        {[][]byte{layer(t, "disk/a->/etc/shadow"), layer(t, "disk/a=second")}, "/disk/a=second", ""},
		"directory for a file": {[][]byte{one, layer(t, "disk/a.img/", "disk/a.img/b=second")}, "/disk/a.img/b=second", ""},
		"file for a directory": {[][]byte{layer(t, "disk/a/b=first"), layer(t, "disk/a=second")}, "/disk/a=second", ""},
		"dots":                 {[][]byte{layer(t, "../../disk/../disk/a=first")}, "/disk/a=first", ""},
		"none":                 {[][]byte{layer(t, "etc/passwd=x", "disk/")}, "", "no file in /disk"},
		"no layers":            {nil, "", "no file in /disk"},
		"whited out":           {[][]byte{one, layer(t, "disk/.wh.a.img=")}, "", "no file in /disk"},
		"a link for /disk":     {[][]byte{one, layer(t, "disk->/etc")}, "", "no file in /disk"},
		"two":                  {[][]byte{one, layer(t, "disk/b=second")}, "", `"/disk/a.img, /disk/b"`},
		"a link":               {[][]byte{layer(t, "disk/a->/etc/shadow")}, "", `"/disk/a" in the image is no`},
		"many":                 {[][]byte{layer(t, many...)}, "", "many files"},
		"truncated":            {[][]byte{layer(t, "disk/a="+strings.Repeat("x", 5000))[:3000]}, "", "truncated"},
		"not a tar archive":    {[][]byte{bytes.Repeat([]byte("text"), 1000)}, "", "damaged"},
		"too much":             {[][]byte{one, layer(t, "disk/a="+strings.Repeat("x", 2<<20))}, "", "more bytes"},
		"trash at the end":     {[][]byte{append(one, make([]byte, 2<<20)...)}, "", "more bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var layers []io.Reader
			for _, l := range tc.layers {
				layers = append(layers, bytes.NewReader(l))
			}
			f, path, err := Find(t.Context(), dir, 1<<20, layers...)
			if tc.words != "" {
				if !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), tc.words) {
					t.Errorf("the error is %v, want %q", err, tc.words)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			b := make([]byte, 100)
			n, err := f.ReadAt(b, 0)
			if got := path + "=" + string(b[:n]); err != io.EOF || got != tc.want {
				t.Errorf("found %s, want %s: %v", got, tc.want, err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("%v are left: %v", left, err)
			}
		})
	}
}

// TestFindVerified: who verifies a layer while it is read is asked to the end, and heard.
func TestFindVerified(t *testing.T) {
	damaged := errors.New("damaged")
	r := io.MultiReader(bytes.NewReader(layer(t, "disk/a=x")), iotest.ErrReader(damaged))
	if _, _, err := Find(t.Context(), t.TempDir(), 1<<20, r); !errors.Is(err, damaged) {
		t.Errorf("the error is %v", err)
	}
}
