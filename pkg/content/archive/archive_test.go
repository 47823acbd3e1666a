// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// pack writes a tar of headers. A file has as much content as its header says.
func pack(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(bytes.Repeat([]byte{'c'}, int(h.Size))); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(content)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstandard(t testing.TB, content []byte, options ...zstd.EOption) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, options...)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(content, nil)
}

func create(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// add writes one archive to a file of its own.
func add(t testing.TB, src io.Reader, limits Limits) (Summary, error) {
	t.Helper()
	w := NewWriter(create(t), limits)
	_, err := w.Add(t.Context(), src)
	return w.Summary(), err
}

// TestLayers adds archives in all compressions, and reads them from where they are.
func TestLayers(t *testing.T) {
	archives := [][]byte{
		pack(t, &tar.Header{Name: "./", Typeflag: tar.TypeDir}, &tar.Header{Name: "./a", Size: 10_000}),
		pack(t, &tar.Header{Name: "/usr/bin/b", Size: 1, Mode: 0o4755}),
		pack(t, &tar.Header{Name: ".wh.a"}, &tar.Header{Name: "usr/.wh..wh..opq"}),
		pack(t, &tar.Header{Name: "usr/bin/c", Typeflag: tar.TypeLink, Linkname: "/usr/bin/b"}),
	}
	padded := append(bytes.Clone(archives[0]), make([]byte, 8192)...) // as a record of tar(1)
	skippable := append([]byte{0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3}, zstandard(t, archives[3])...)
	f := create(t)
	w := NewWriter(f, Limits{})
	for i, src := range [][]byte{padded, gzipped(t, archives[1]), zstandard(t, archives[2]), skippable} {
		layer, err := w.Add(t.Context(), bytes.NewReader(src))
		if err != nil {
			t.Fatalf("archive %d: %v", i, err)
		}
		if layer.Offset%blockSize != 0 || layer.Length != int64(len(archives[i])) {
			t.Errorf("archive %d of %d bytes is at %+v", i, len(archives[i]), layer)
		}
		got, err := io.ReadAll(io.NewSectionReader(f, layer.Offset, layer.Length))
		if err != nil || !bytes.Equal(got, archives[i]) {
			t.Errorf("archive %d has other content: %v", i, err)
		}
	}
	s := w.Summary()
	if s.Entries != 6 || s.Bytes != 10_001 || s.files != 4 || s.directories != 3 || s.implicit != 2 || s.links != 1 {
		t.Errorf("found %+v", s)
	}
}

// TestShortReads reads archives from sources that have little at a time.
func TestShortReads(t *testing.T) {
	b := pack(t, &tar.Header{Name: "a", Size: 10_000}, &tar.Header{Name: "b", Typeflag: tar.TypeDir})
	for _, src := range [][]byte{b, gzipped(t, b), zstandard(t, b)} {
		for _, slow := range []func(io.Reader) io.Reader{iotest.OneByteReader, iotest.HalfReader, iotest.DataErrReader} {
			if s, err := add(t, slow(bytes.NewReader(src)), Limits{}); err != nil || s.Entries != 2 || s.Bytes != 10_000 {
				t.Errorf("found %+v, %v", s, err)
			}
		}
	}
}

// TestHoles writes an archive of a file of zeros, which takes no space.
func TestHoles(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	content := make([]byte, 8*size.MiB)
	content[4*size.MiB] = 1
	err := errors.Join(w.WriteHeader(&tar.Header{Name: "a", Size: int64(len(content))}), func() error { _, err := w.Write(content); return err }(), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	f := create(t)
	if _, err := NewWriter(f, Limits{}).Add(t.Context(), bytes.NewReader(b.Bytes())); err != nil {
		t.Fatal(err)
	}
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if took := fi.Sys().(*syscall.Stat_t).Blocks * 512; took > 64*size.KiB {
		t.Errorf("%d bytes take %d", fi.Size(), took)
	}
	got := make([]byte, b.Len())
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, b.Bytes()) {
		t.Errorf("other content: %v", err)
	}
}

// TestRefused checks what each bad archive is told.
func TestRefused(t *testing.T) {
	long := strings.Repeat("n", 256)
	good := pack(t, &tar.Header{Name: "a", Size: 5000})
	noise := make([]byte, 200_000) // that does not compress
	for i := range noise {
		noise[i] = byte(i * i * i >> 7)
	}
	many := func(n int) (headers []*tar.Header) {
		for i := range n {
			headers = append(headers, &tar.Header{Name: fmt.Sprint(i)})
		}
		return headers
	}
	entry := func(h *tar.Header) []byte { return pack(t, h) }
	small := Limits{Bytes: 8192, Entries: 10}
	for name, c := range map[string]struct {
		src    []byte
		limits Limits
		want   error
		says   string
	}{
		"empty":           {nil, small, ErrDamaged, "empty"},
		"text":            {bytes.Repeat([]byte("no tar\n"), 200), small, ErrDamaged, "no tar archive"},
		"short text":      {[]byte("no tar\n"), small, ErrDamaged, "too early"},
		"cut in a file":   {good[:3000], small, ErrDamaged, "too early, after 2.9Ki"},
		"cut in a header": {good[:300], small, ErrDamaged, "too early"},
		"cut at the end":  {good[:512+5120], small, ErrDamaged, "was cut off after 5.5Ki"},
		"cut after zeros": {zeroFile(t)[:1024], small, ErrDamaged, "was cut off after 1Ki"},
		"broken header":   {append(bytes.Clone(good[:5632]), good[1000:2000]...), small, ErrDamaged, "a header in it is broken"},
		"gzip cut":        {gzipped(t, noise)[:1000], Limits{}, ErrDamaged, ""},
		"gzip broken":     {append(gzipped(t, good)[:60], 0xff, 0xff, 0xff, 0xff, 0xff), small, ErrDamaged, ""},
		"gzip checksum":   {flip(gzipped(t, good), -6), small, ErrDamaged, "compression is broken"},
		"gzip and more":   {append(gzipped(t, good), "more"...), small, ErrDamaged, ""},
		"zstd cut":        {zstandard(t, good)[:40], small, ErrDamaged, "too early"},
		"zstd broken":     {flip(zstandard(t, good), 20), small, ErrDamaged, ""},
		"xz":              {[]byte("\xfd7zXZ\x00....."), small, ErrRefused, "compressed as xz; use gzip, zstd"},
		"zip":             {[]byte("PK\x03\x04......"), small, ErrRefused, "compressed as zip"},
		"window":          {window(t), Limits{}, ErrRefused, "more than 32Mi of memory"},

		"too large":      {pack(t, &tar.Header{Name: "a", Size: 8192}), small, ErrLimit, "more than 8Ki when"},
		"bomb":           {gzipped(t, pack(t, &tar.Header{Name: "a", Size: 100 * size.MiB})), Limits{Ratio: 10}, ErrLimit, "over 10 times as much"},
		"zstd bomb":      {zstandard(t, pack(t, &tar.Header{Name: "a", Size: 100 * size.MiB})), Limits{}, ErrLimit, "over 250 times as much; if that is right, give it uncompressed"},
		"entries":        {pack(t, many(11)...), Limits{Entries: 10}, ErrLimit, "more than 10 entries"},
		"entries, paths": {pack(t, &tar.Header{Name: strings.Repeat("a/", 10) + "a"}), small, ErrLimit, "more than 10 entries"},

		"parent":        {entry(&tar.Header{Name: "a/../../etc/passwd"}), small, ErrRefused, `entry "a/../../etc/passwd" has ".." in its path`},
		"only a parent": {entry(&tar.Header{Name: "..", Typeflag: tar.TypeDir}), small, ErrRefused, `has ".."`},
		"name":          {entry(&tar.Header{Name: "a/" + long}), small, ErrRefused, "a name of 256 bytes, Linux allows 255"},
		"path":          {entry(&tar.Header{Name: strings.Repeat("abcdefg/", 512), Typeflag: tar.TypeDir}), small, ErrRefused, "a path of 4096 bytes"},
		"depth":         {entry(&tar.Header{Name: strings.Repeat("a/", 257), Typeflag: tar.TypeDir}), small, ErrRefused, "more than 256 directories deep"},
		"root":          {entry(&tar.Header{Name: "."}), small, ErrRefused, "is the root, and not a directory"},
		"root link":     {entry(&tar.Header{Name: "/", Typeflag: tar.TypeSymlink, Linkname: "/etc"}), small, ErrRefused, ""},
		"device":        {entry(&tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock}), small, ErrRefused, `entry "dev/sda" is a device; leave it out`},
		"char device":   {entry(&tar.Header{Name: "dev/kmem", Typeflag: tar.TypeChar}), small, ErrRefused, "is a device"},
		"fifo":          {entry(&tar.Header{Name: "run/f", Typeflag: tar.TypeFifo}), small, ErrRefused, `entry "run/f" is a FIFO`},
		"type":          {retyped(entry(&tar.Header{Name: "a"}), 'V'), small, ErrRefused, `the unknown type "V"`},
		"contiguous":    {retyped(entry(&tar.Header{Name: "a"}), tar.TypeCont), small, ErrRefused, `the unknown type "7"`},
		"link out":      {entry(&tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "../../etc/shadow"}), small, ErrRefused, `a hard link, whose target "../../etc/shadow" has ".."`},
		"link to root":  {entry(&tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "/"}), small, ErrRefused, `target "/" is the root`},
		"whiteout":      {entry(&tar.Header{Name: "a/.wh..."}), small, ErrRefused, "removes no name"},
		"no symlink":    {entry(&tar.Header{Name: "a", Typeflag: tar.TypeSymlink}), small, ErrRefused, "Linux allows 1 to 4095"},
		"owner":         {entry(&tar.Header{Name: "a", Uid: math.MaxUint32}), small, ErrRefused, "ids are from 0 to 4294967294"},
		"attribute":     {entry(&tar.Header{Name: "a", PAXRecords: map[string]string{xattrRecord + "user.a": strings.Repeat("v", 1<<16+1)}}), Limits{}, ErrRefused, `the extended attribute "user.a" of 64Ki`},
		"extended":      {extended(t, 1<<20), Limits{}, ErrRefused, "extended header has more than 1Mi"},
		"sparse":        {sparseEntry(t, math.MaxInt64-1024), Limits{}, ErrRefused, "a file has at most"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := add(t, bytes.NewReader(c.src), c.limits)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%v, want %v with %q", err, c.want, c.says)
			}
			for _, fault := range plain.Faults(err.Error()) {
				t.Errorf("%s: %v", fault, err)
			}
		})
	}
}

func flip(b []byte, at int) []byte {
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 0xff
	return b
}

// window is a frame of zstd that needs 64 MiB of memory: RFC 8878, 3.1.1.1.2.
func window(t testing.TB) []byte {
	t.Helper()
	return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 16 << 3, 0x01, 0x00, 0x00, 0x00}
}

// extended is an archive with an extended header of more than so many bytes, which tar.Writer does not write.
func extended(t testing.TB, length int) []byte {
	t.Helper()
	value := strings.Repeat("v", length)
	record := fmt.Sprintf("%d comment=%s\n", len(value)+len("1000000 comment=\n"), value)
	b := pack(t, &tar.Header{Name: "h", Size: int64(len(record))})
	copy(b[512:], record)
	return retyped(b, tar.TypeXHeader)
}

// sparseEntry is an archive of a sparse file with a block of content at its end, in the form that GNU tar calls 1.0.
func sparseEntry(t testing.TB, length int64) []byte {
	t.Helper()
	sparseMap := fmt.Sprintf("1\n%d\n%d\n", length-100, 100)
	content := append([]byte(sparseMap), make([]byte, 512-len(sparseMap))...)
	content = append(content, bytes.Repeat([]byte{'s'}, 100)...)
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", "GNU.sparse.realsize=" + fmt.Sprint(length)} {
		n := len(r) + 3
		for len(fmt.Sprintf("%d %s\n", n, r)) != n {
			n++
		}
		records += fmt.Sprintf("%d %s\n", n, r)
	}
	header := pack(t, &tar.Header{Name: "x", Size: int64(len(records))})
	copy(header[512:], records)
	header = retyped(header, tar.TypeXHeader)
	file := pack(t, &tar.Header{Name: "sparse", Size: int64(len(content))})
	copy(file[512:], content)
	return append(header[:1024], file...)
}

// zeroFile is an archive of a file that looks like the end of the archive.
func zeroFile(t testing.TB) []byte {
	t.Helper()
	b := pack(t, &tar.Header{Name: "a", Size: 512}, &tar.Header{Name: "b"})
	clear(b[512:1024])
	return b
}

// retyped gives the first entry another type.
func retyped(b []byte, typeflag byte) []byte {
	b[156] = typeflag
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestAllowed reads what looks dangerous and is not.
func TestAllowed(t *testing.T) {
	s, err := add(t, bytes.NewReader(pack(t,
		&tar.Header{Name: ".", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 999},
		&tar.Header{Name: "/usr/bin/sudo", Mode: 0o4755, Size: 7},
		&tar.Header{Name: "a..b/...", Size: 1},
		&tar.Header{Name: "shadow", Typeflag: tar.TypeSymlink, Linkname: "/../../etc/shadow"},
		&tar.Header{Name: "x", PAXRecords: map[string]string{xattrRecord + "security.capability": strings.Repeat("c", 1<<16)}},
		&tar.Header{Name: strings.Repeat("a/", 255) + strings.Repeat("n", 255)},
		&tar.Header{Name: "comment", Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "by git-archive"}},
	)), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Entries != 6 || s.Bytes != 8 || s.symlinks != 1 || s.carry != 1 {
		t.Errorf("found %+v", s)
	}
}

// TestSparse counts what is stored of a sparse file, however large it is.
func TestSparse(t *testing.T) {
	s, err := add(t, bytes.NewReader(sparseEntry(t, 1<<40)), Limits{Bytes: size.MiB})
	if err != nil {
		t.Fatal(err)
	}
	if s.Entries != 1 || s.Bytes < 100 || s.Bytes > 2048 || s.blocks > 2*blockSize {
		t.Errorf("found %+v", s)
	}
	if needs := s.Needs("ext4", nil, 0); needs > 20*size.MiB {
		t.Errorf("a sparse file needs %s", size.Format(needs))
	}
}

// TestSourceErrors returns the errors of others as they are.
func TestSourceErrors(t *testing.T) {
	good := pack(t, &tar.Header{Name: "a", Size: 100_000})
	broken := errors.New("broken")
	for _, src := range [][]byte{good, gzipped(t, good), zstandard(t, good)} {
		_, err := add(t, io.MultiReader(bytes.NewReader(src[:len(src)/2]), failing{broken}), Limits{})
		if !errors.Is(err, broken) || errors.Is(err, ErrDamaged) {
			t.Errorf("the source failed: %v", err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	if _, err := NewWriter(create(t), Limits{}).Add(ctx, bytes.NewReader(good)); !errors.Is(err, broken) {
		t.Errorf("the context ended: %v", err)
	}
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	_, err = NewWriter(full, Limits{}).Add(t.Context(), bytes.NewReader(pack(t, &tar.Header{Name: "a", Size: 2 * size.MiB})))
	if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrDamaged) {
		t.Errorf("the disk is full: %v", err)
	}
}

type failing struct{ error }

func (f failing) Read([]byte) (int, error) { return 0, f.error }

// TestNeedsOfSizes asks for the size that a content needs, given the size that is wanted.
func TestNeedsOfSizes(t *testing.T) {
	inodes := Summary{files: 100_000}
	data := Summary{files: 1, blocks: 10 * size.GiB}
	for _, c := range []struct {
		s          Summary
		filesystem string
		options    map[string]string
		from       int64
		low, high  int64
	}{
		{Summary{}, "ext4", nil, 256 * size.MiB, 256 * size.MiB, 256 * size.MiB},
		{Summary{}, "xfs", nil, 300 * size.MiB, 300 * size.MiB, 300 * size.MiB},
		{Summary{}, "btrfs", nil, 109 * size.MiB, 109 * size.MiB, 109 * size.MiB},
		{Summary{}, "raw", nil, 1, size.MiB, size.MiB},
		{inodes, "ext4", nil, 0, 390 * size.MiB, 480 * size.MiB},
		{inodes, "ext4", nil, 480 * size.MiB, 480 * size.MiB, 480 * size.MiB},
		{inodes, "ext4", nil, 600 * size.MiB, 1562 * size.MiB, 1700 * size.MiB}, // fewer inodes than in 480 MiB
		{inodes, "ext4", map[string]string{"bytes-per-inode": "2048"}, 0, 195 * size.MiB, 400 * size.MiB},
		{inodes, "ext4", map[string]string{"bytes-per-inode": "65536"}, 0, 6250 * size.MiB, 6400 * size.MiB},
		{data, "ext4", nil, 0, 10 * size.GiB, 10*size.GiB + 600*size.MiB},
		{data, "xfs", nil, 0, 10 * size.GiB, 10*size.GiB + 600*size.MiB},
		{data, "btrfs", nil, 0, 10 * size.GiB, 10*size.GiB + 600*size.MiB},
		{data, "ext4", nil, 20 * size.GiB, 20 * size.GiB, 20 * size.GiB},
		{data, "ext4", map[string]string{"reserved-percent": "50"}, 0, 20 * size.GiB, 22 * size.GiB},
	} {
		got := c.s.Needs(c.filesystem, c.options, c.from)
		if got < c.low || got > c.high || got%size.MiB != 0 {
			t.Errorf("%d files and %s in %s %v, from %s on: %s, want %s to %s", c.s.files, size.Format(c.s.blocks), c.filesystem,
				c.options, size.Format(c.from), size.Format(got), size.Format(c.low), size.Format(c.high))
		}
	}
}
