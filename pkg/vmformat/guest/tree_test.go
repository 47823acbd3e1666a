// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// then is the time of entries.
var then = time.Date(2020, 2, 3, 4, 5, 6, 789e6, time.UTC)

// item is an entry of a test's archive.
type item struct {
	name    string
	kind    byte // 0 is a regular file, or a directory if the name ends with "/"
	mode    int64
	uid     int
	gid     int
	link    string
	content string
	attrs   map[string]string
}

// archive writes a tar.
func archive(t testing.TB, items ...item) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, i := range items {
		h := &tar.Header{
			Name: i.name, Typeflag: i.kind, Mode: i.mode, Uid: i.uid, Gid: i.gid, Linkname: i.link, Size: int64(len(i.content)),
			ModTime: then, Format: tar.FormatPAX, PAXRecords: map[string]string{},
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(i.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = map[byte]int64{tar.TypeDir: 0o755, tar.TypeSymlink: 0o777}[h.Typeflag]
			if h.Mode == 0 {
				h.Mode = 0o644
			}
		}
		for k, v := range i.attrs {
			h.PAXRecords[paxAttr+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%s: %v", i.name, err)
		}
		if _, err := w.Write([]byte(i.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// diskOf is a disk with archives.
func diskOf(archives ...[]byte) ([]Layer, contentDisk) {
	var layers []Layer
	var disk []byte
	for _, a := range archives {
		layers = append(layers, Layer{int64(len(disk)), int64(len(a))})
		disk = append(disk, a...)
	}
	return layers, contentDisk{bytes.NewReader(disk), func(Progress) {}}
}

// describe describes one file. names has the files that were seen before.
func describe(path, rel string, names map[uint64]string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", err
	}
	what := map[uint32]string{unix.S_IFDIR: "dir", unix.S_IFREG: "file", unix.S_IFLNK: "link"}[st.Mode&unix.S_IFMT]
	s := fmt.Sprintf("%s %o %d:%d", what, st.Mode&0o7777, st.Uid, st.Gid)
	switch what {
	case "file":
		if first := names[st.Ino]; first != "" {
			return "= " + first, nil
		}
		names[st.Ino] = rel
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		s += fmt.Sprintf(" %.20q", b)
	case "link":
		text, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		s += " → " + text
	}
	if mtime := time.Unix(st.Mtim.Unix()); mtime.Equal(then) {
		s += " then"
	}
	attrs, err := attributesOf(path)
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		s += fmt.Sprintf(" %s=%q", k, attrs[k])
	}
	return s, err
}

func attributesOf(path string) (map[string]string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for attr := range strings.SplitSeq(string(list[:n]), "\x00") {
		if attr == "" || attr == "security.selinux" || strings.HasPrefix(attr, "trusted.SGI_ACL_") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, attr, value)
		if err != nil {
			return nil, err
		}
		found[attr] = string(value[:n])
	}
	return found, nil
}

// TestWindow reads and seeks in a part of a disk.
func TestWindow(t *testing.T) {
	disk := bytes.Repeat([]byte("0123456789abcdef"), 3*pieceSize/16)
	read := int64(0)
	w := &window{disk: bytes.NewReader(disk), start: 16, size: int64(len(disk)) - 32, read: func(at int64) { read = at }}
	for at := int64(0); at < w.size; at += pieceSize/2 + 7 {
		if _, err := w.Seek(at, io.SeekStart); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, min(100, w.size-at))
		if _, err := io.ReadFull(w, b); err != nil || !bytes.Equal(b, disk[16+at:][:len(b)]) {
			t.Fatalf("at %d it reads %q: %v", at, b, err)
		}
	}
	if read != w.size {
		t.Errorf("it told of %d bytes read, want %d", read, w.size)
	}
	if end, err := w.Seek(0, io.SeekEnd); err != nil || end != w.size {
		t.Errorf("the end is at %d: %v", end, err)
	}
	if n, err := w.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("at the end it reads %d bytes: %v", n, err)
	}
	short := &window{disk: bytes.NewReader(disk[:10]), start: 10, size: 10, read: func(int64) {}}
	if _, err := short.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
		t.Errorf("a disk that ends too early: %v", err)
	}
	if _, err := w.Seek(-1, io.SeekStart); err == nil {
		t.Error("a place before the beginning was accepted")
	}
}

// TestData finds the blocks that are not zeros.
func TestData(t *testing.T) {
	b := make([]byte, 5*holeBlock+10)
	b[holeBlock], b[3*holeBlock-1], b[len(b)-1] = 1, 1, 1
	var got []int
	for from, to := range data(b) {
		got = append(got, from, to)
	}
	if want := []int{holeBlock, 3 * holeBlock, 5 * holeBlock, len(b)}; !slices.Equal(got, want) {
		t.Errorf("data at %v, want %v", got, want)
	}
	for from := range data(make([]byte, 2*holeBlock)) {
		t.Errorf("zeros are data at %d", from)
	}
}

// TestRootOfContent decides owner and mode of the root directory.
func TestRootOfContent(t *testing.T) {
	id, mode, group := 7, uint32(0o1700), int64(2000)
	has := owned{1, 2, 0o755}
	for want, c := range map[owned]Content{
		has:               {},
		{7, 7, 0o1700}:    {UID: &id, GID: &id, Mode: &mode},
		{1, 2000, 0o2775}: {FSGroup: &group},
		{7, 2000, 0o3770}: {UID: &id, GID: &id, Mode: &mode, FSGroup: &group},
	} {
		if got := c.root(has); got != want {
			t.Errorf("%+v gives %+v, want %+v", c, got, want)
		}
	}
}

// FuzzUnpack unpacks anything, as two layers, beside a file that must stay as it is. An archive
// that names its way out of the root is the reason for this test.
func FuzzUnpack(f *testing.F) {
	symlink := func(name, to string) item { return item{name: name, kind: tar.TypeSymlink, link: to} }
	f.Add(archive(f, item{name: "a/b", content: "x"}, symlink("l", "../outside"), item{name: "l", content: "x"}))
	f.Add(archive(f, symlink("l", ".."), item{name: "l/outside", content: "x"}))
	f.Add(archive(f, symlink("a", ".."), item{name: "h", kind: tar.TypeLink, link: "a/outside"}))
	f.Add(archive(f, item{name: ".wh..wh..opq"}, item{name: "a/.wh..."}, item{name: "a/.wh.b"}, item{name: "a/"}))
	f.Add(archive(f, item{name: "../outside", content: "x"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		outside, root := filepath.Join(dir, "outside"), filepath.Join(dir, "root")
		if err := os.WriteFile(outside, []byte("untouched"), 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		at, err := os.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		defer at.Close()
		u := newUnpacker(int(at.Fd()), Content{})
		defer u.close()
		layers, disk := diskOf(b, b)
		u.all(layers, disk) // fill would sync the whole filesystem each time
		found, err := os.ReadDir(dir)
		if err != nil || len(found) != 2 {
			t.Fatalf("beside the root are %v: %v", found, err)
		}
		is, err := describe(outside, "outside", map[uint64]string{})
		if err != nil || !strings.HasPrefix(is, "file 640") || !strings.Contains(is, `"untouched"`) {
			t.Errorf("the file outside is %s: %v", is, err)
		}
	})
}
