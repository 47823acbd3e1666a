// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// maxWindow is how far back zstd may refer, in bytes: the memory that decompression takes. Level 19
// of zstd(1) needs 8 MiB, level 20 needs 32 MiB.
const maxWindow = 32 * size.MiB

// compressions are known by what a file begins with. One without a function to open it is refused by its
// name.
var compressions = []struct {
	name  string
	magic []byte
	mask  []byte // of the magic's bits; nil means all
	open  func(io.Reader) (io.ReadCloser, error)
}{
	{"gzip", []byte{0x1f, 0x8b}, nil, func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }},
	{"zstd", []byte{0x28, 0xb5, 0x2f, 0xfd}, nil, openZstd},
	{"zstd", []byte{0x50, 0x2a, 0x4d, 0x18}, []byte{0xf0, 0xff, 0xff, 0xff}, openZstd}, // a skippable frame
	{"xz", []byte("\xfd7zXZ\x00"), nil, nil},
	{"bzip2", []byte("BZh"), nil, nil},
	{"lz4", []byte{0x04, 0x22, 0x4d, 0x18}, nil, nil},
	{"zip", []byte("PK\x03\x04"), nil, nil},
}

func openZstd(r io.Reader) (io.ReadCloser, error) {
	// A decoder that works ahead has goroutines and buffers of its own.
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(math.MaxInt64))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

// decompress returns the plain archive, and the name of its compression, which is empty for none.
func decompress(src io.Reader) (io.ReadCloser, string, error) {
	buffered := bufio.NewReaderSize(src, 64*size.KiB)
	begin, err := buffered.Peek(8)
	if len(begin) == 0 {
		if err == io.EOF {
			err = fmt.Errorf("%w: it is empty", ErrDamaged)
		}
		return nil, "", err
	}
	for _, c := range compressions {
		if !matches(begin, c.magic, c.mask) {
			continue
		}
		if c.open == nil {
			return nil, "", fmt.Errorf("%w: it is compressed as %s; use gzip, zstd or none", ErrRefused, c.name)
		}
		plain, err := c.open(buffered)
		return plain, c.name, err
	}
	return io.NopCloser(buffered), "", nil
}

func matches(b, magic, mask []byte) bool {
	if len(b) < len(magic) {
		return false
	}
	b = bytes.Clone(b[:len(magic)])
	for i := range mask {
		b[i] &= mask[i]
	}
	return bytes.Equal(b, magic)
}

// decompression says what is wrong with a compressed archive of which n bytes were read.
func decompression(err error, n int64) error {
	if errors.Is(err, zstd.ErrWindowSizeExceeded) {
		return fmt.Errorf("%w: zstd needs more than %s of memory for it; compress it at level 20 or less, "+
			"without a longer window", ErrRefused, size.Format(maxWindow))
	}
	return fmt.Errorf("%w: its compression is broken before byte %d (%w)", ErrDamaged, n, err)
}
