//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// formats are format options that change how much a filesystem holds. A filesystem has some of them.
var formats = []map[string]string{
	nil, {"bytes-per-inode": "8192", "inode-size": "512"}, {"metadata-profile": "dup"},
}

// trees are contents of which one filesystem or another has too little: blocks, inodes, room for names.
var trees = []struct {
	name    string
	formats int // how many of the formats are tried
	fill    func(*maker)
}{
	{"small", 3, func(m *maker) {
		for i := range 20_000 {
			m.file(fmt.Sprintf("node_modules/package-%d/lib/a-file-with-its-name-%d.js", i/100, i), 100+i*7%2900)
		}
	}},
	{"large", 1, func(m *maker) {
		for i := range 3 {
			m.file(fmt.Sprintf("base/%d", i), 160*size.MiB)
		}
	}},
	{"empty", 1, func(m *maker) {
		for i := range 40_000 {
			m.file(fmt.Sprintf("locks/%d", i), 0)
		}
		for i := range 10_000 {
			m.link(fmt.Sprintf("links/%d/%d", i/10, i), strings.Repeat("t", i%120+1))
		}
	}},
}

// maker writes a tar.
type maker struct {
	*testing.T
	*tar.Writer
	data []byte
}

func (m *maker) file(name string, length int) {
	m.header(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(length), Mode: 0o644})
	for length > 0 {
		n, err := m.Write(m.data[:min(length, len(m.data))])
		if err != nil {
			m.Fatal(err)
		}
		length -= n
	}
}

func (m *maker) link(name, target string) {
	m.header(&tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target})
}

func (m *maker) header(h *tar.Header) {
	if err := m.WriteHeader(h); err != nil {
		m.Fatal(err)
	}
}

// make writes a tar to a file.
func (m *maker) make(path string, fill func(*maker)) {
	f, err := os.Create(path)
	if err != nil {
		m.Fatal(err)
	}
	defer f.Close()
	buffered := bufio.NewWriterSize(f, size.MiB)
	m.Writer, m.data = tar.NewWriter(buffered), bytes.Repeat([]byte("0123456789abcde\n"), size.MiB/16)
	fill(m)
	if err := m.Writer.Close(); err != nil {
		m.Fatal(err)
	}
	if err := buffered.Flush(); err != nil {
		m.Fatal(err)
	}
}

// TestNeeds unpacks contents in filesystems of the size that they need, where they must fit, and in filesystems of a
// third of it, where they must not. A filesystem's own least size may be more than that.
func TestNeeds(t *testing.T) {
	dir := testenv.Dir(t)
	for _, tree := range trees {
		path := filepath.Join(dir, tree.name)
		(&maker{T: t}).make(path, tree.fill)
		summary := summarize(t, path)
		for _, name := range diskfs.Names() {
			for _, options := range formats[:tree.formats] {
				fs, err := diskfs.Lookup(name)
				if err != nil {
					t.Fatal(err)
				}
				if fs.CheckOptions(options) != nil {
					continue
				}
				t.Run(fmt.Sprint(tree.name, "/", name, len(options)), func(t *testing.T) {
					needs := summary.Needs(name, options, fs.MinSize)
					if out, err := unpacked(t, fs, options, needs, path); err != nil {
						t.Errorf("%s, which it needs, do not hold it: %v\n%.500s", size.Format(needs), err, out)
					}
					less := max(needs/3/size.MiB*size.MiB, fs.MinSize)
					if less > needs/2 {
						return
					}
					if _, err := unpacked(t, fs, options, less, path); err == nil {
						t.Errorf("it needs %s, and %s hold it", size.Format(needs), size.Format(less))
					}
				})
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func summarize(t *testing.T, path string) Summary {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	plain, err := os.Create(path + ".plain")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(plain.Name())
	defer plain.Close()
	w := NewWriter(plain, Limits{})
	if _, err := w.Add(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	return w.Summary()
}

// unpacked unpacks a tar in a new filesystem of a size.
func unpacked(
	t *testing.T, fs *diskfs.Filesystem, options map[string]string, bytes int64, path string,
) (string, error) {
	t.Helper()
	dir := testenv.Dir(t)
	image, at := filepath.Join(dir, "image"), filepath.Join(dir, "at")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, fs.Mkfs, fs.MkfsArgs(image, "", options)...)
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "-o", "loop", image, at)
	defer testenv.Umount(t, at)
	out, err := testenv.Try("tar", "-xf", path, "-C", at)
	if err == nil {
		out, err = testenv.Try("sync", "-f", at)
	}
	return out + testenv.Run(t, "df", "--output=size,used,avail,itotal,iavail", at), err
}
