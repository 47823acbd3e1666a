// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
	"github.com/u-root/u-root/pkg/boot/bzimage"
)

// compression is a format in which distributions compress kernels and modules.
type compression struct {
	suffix string // of a module's file; "" if the kernel knows no such modules
	magic  string // what a compressed kernel begins with
	whole  bool   // the format ends with the size of the content, which the kernel's build appends to all others
	open   func(io.Reader) (io.ReadCloser, error)
}

// maxWindow is how far back a compressed stream may refer, and so how much memory it may take
// to decompress one. The kernel's build compresses itself with windows of up to 128 MiB: see
// scripts/Makefile.lib (zstd -22 --ultra) and scripts/xz_wrap.sh.
const maxWindow = 128 << 20

// compressions has the known formats. They are decompressed by one thread, as a stream: the
// window is in memory, and not the content.
var compressions = []compression{
	{suffix: ".gz", magic: "\x1f\x8b", whole: true, open: func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }},
	{suffix: ".xz", magic: "\xfd7zXZ\x00", open: func(r io.Reader) (io.ReadCloser, error) {
		z, err := xz.NewReader(r, maxWindow)
		return io.NopCloser(z), err
	}},
	{suffix: ".zst", magic: "\x28\xb5\x2f\xfd", open: func(r io.Reader) (io.ReadCloser, error) {
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}},
	{magic: lz4Magic, open: func(r io.Reader) (io.ReadCloser, error) { return io.NopCloser(&legacyLZ4{from: r}), nil }},
}

// decompress writes to w what r contains in a compressed form, and returns how many bytes
// that are.
func (c compression) decompress(w io.Writer, r io.Reader) (int64, error) {
	from, err := c.open(r)
	if err != nil {
		return 0, err
	}
	defer from.Close()
	return io.Copy(w, from)
}

const (
	lz4Magic = "\x02\x21\x4c\x18"
	lz4Block = 8 << 20 // bytes of a block's content, but for the last
)

// legacyLZ4 reads what the kernel's build compressed with lz4 -l: the magic number, and then
// blocks, each after its compressed size. Its two buffers are for one block. The reader of
// package lz4 takes up to seven such buffers, and keeps them for a while.
//
// Source: "Legacy frame" in lz4's doc/lz4_Frame_format.md.
type legacyLZ4 struct {
	from    io.Reader
	begun   bool
	packed  []byte
	block   []byte
	content []byte // what of block is still to be read
}

func (l *legacyLZ4) Read(b []byte) (int, error) {
	for len(l.content) == 0 {
		if err := l.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, l.content)
	l.content = l.content[n:]
	return n, nil
}

// next decompresses the next block, or returns [io.EOF].
func (l *legacyLZ4) next() error {
	var head [4]byte
	if !l.begun {
		if _, err := io.ReadFull(l.from, head[:]); err != nil {
			return err
		}
		l.begun, l.block = true, make([]byte, lz4Block)
	}
	if _, err := io.ReadFull(l.from, head[:]); err != nil {
		return err
	}
	size := int(binary.LittleEndian.Uint32(head[:]))
	if size > lz4.CompressBlockBound(lz4Block) {
		return fmt.Errorf("an lz4 block of %d bytes is too large", size)
	}
	if size > cap(l.packed) {
		l.packed = make([]byte, size)
	}
	if _, err := io.ReadFull(l.from, l.packed[:size]); err != nil {
		return noEOF(err)
	}
	n, err := lz4.UncompressBlock(l.packed[:size], l.block)
	l.content = l.block[:max(n, 0)]
	return err
}

// noEOF turns an end of file where there must be none into an error.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// errBootAsIs means that the kernel inside an image cannot be unpacked here. QEMU boots the
// image itself, which takes half a second to a second longer.
var errBootAsIs = errors.New("the compression of its kernel is unknown")

// unpackBzImage writes the ELF kernel that a bzImage contains. It reads the image from its
// beginning to the end of the kernel.
//
// "If payload_offset and payload_length are non-zero, the payload may be found […] at the
// offset payload_offset from the beginning of the protected-mode code". The last 4 bytes of
// the payload are the kernel's size. Documentation/arch/x86/boot.rst
func unpackBzImage(w io.Writer, image io.Reader) error {
	var h bzimage.LinuxHeader
	if err := binary.Read(image, binary.LittleEndian, &h); err != nil {
		return fmt.Errorf("reading its header: %w", err)
	}
	if h.HeaderMagic != bzimage.HeaderMagic || h.Protocolversion < 0x208 || h.PayloadSize < 4 {
		return errors.New("it is no bzImage of Linux 2.6.26 or newer")
	}
	sectors := int64(h.SetupSects)
	if sectors == 0 {
		sectors = 4 // "For backwards compatibility"
	}
	before := (sectors+1)*512 + int64(h.PayloadOffset) - int64(binary.Size(h))
	if _, err := io.CopyN(io.Discard, image, before); err != nil {
		return fmt.Errorf("it ends before its kernel: %w", err)
	}
	return unpackPayload(w, image, int64(h.PayloadSize))
}

// unpackPayload decompresses a payload of so many bytes, and checks it against the size at its
// end.
func unpackPayload(w io.Writer, image io.Reader, size int64) error {
	end := &lastBytes{}
	payload := bufio.NewReader(io.TeeReader(io.LimitReader(image, size), end))
	c, err := compressionOf(payload)
	if err != nil {
		return err
	}
	from := io.Reader(payload)
	if !c.whole {
		from = io.LimitReader(payload, size-int64(len(end)))
	}
	n, err := c.decompress(w, from)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, payload); err != nil {
		return err
	}
	if want := binary.LittleEndian.Uint32(end[:]); uint32(n) != want {
		return fmt.Errorf("it is damaged: the kernel in it has %d bytes, and its header says %d", n, want)
	}
	return nil
}

// compressionOf returns the format that a kernel begins with, or [errBootAsIs].
func compressionOf(payload *bufio.Reader) (compression, error) {
	for _, c := range compressions {
		b, err := payload.Peek(len(c.magic))
		if err != nil {
			return compression{}, fmt.Errorf("it ends before its kernel: %w", err)
		}
		if string(b) == c.magic {
			return c, nil
		}
	}
	return compression{}, errBootAsIs
}

// lastBytes keeps the last bytes that were written to it.
type lastBytes [4]byte

func (l *lastBytes) Write(b []byte) (int, error) {
	all := append(l[:len(l):len(l)], b[max(0, len(b)-len(l)):]...)
	copy(l[:], all[len(all)-len(l):])
	return len(b), nil
}

const (
	linuxBanner  = "Linux version "
	longestUname = 64 // bytes of a release; uname(2)
)

// bannerVersion finds the release in the banner of a vmlinux. It reads the image piece by piece.
func bannerVersion(image io.Reader) (string, error) {
	const overlap = len(linuxBanner) + longestUname + 1
	buf := make([]byte, 0, 64<<10)
	for {
		n, err := io.ReadFull(image, buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if _, rest, found := bytes.Cut(buf, []byte(linuxBanner)); found {
			if version, _, ok := bytes.Cut(rest[:min(len(rest), longestUname+1)], []byte(" ")); ok {
				return string(version), nil
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return "", errors.New("it is an ELF file without a Linux banner")
		}
		if err != nil {
			return "", err
		}
		buf = buf[:copy(buf, buf[len(buf)-overlap:])]
	}
}
