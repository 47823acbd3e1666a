// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

var (
	// ErrDamaged means that an archive cannot be read to its end.
	ErrDamaged = errors.New("damaged archive")
	// ErrRefused means that an archive has something that no volume may get from it, or that Linux has no
	// room for.
	ErrRefused = errors.New("refused archive")
	// ErrLimit means that an archive is larger than the [Limits] allow.
	ErrLimit = errors.New("archive too large")
)

// Limits bound what one [Writer] takes. A field that is 0 has its default.
type Limits struct {
	// Bytes is how long all plain archives together may be, in bytes. The default is 1 TiB.
	Bytes int64
	// Entries is how many members all archives together may have. Directories that are only parts of paths
	// count too. Each one takes memory while the archive is read. The default is 2 million.
	Entries int64
	// Ratio is how many times its compressed size an archive may have. The first 64 MiB are free. The
	// default is 250: text rarely exceeds 20, and an empty database of PostgreSQL has 12.
	Ratio int64
}

const (
	defaultBytes   = 1 << 40
	defaultEntries = 2_000_000
	defaultRatio   = 250
	// ratioFree is what the ratio does not apply to, in bytes: no node suffers from so little.
	ratioFree = 64 * size.MiB
)

func (l Limits) withDefaults() Limits {
	if l.Bytes == 0 {
		l.Bytes = defaultBytes
	}
	if l.Entries == 0 {
		l.Entries = defaultEntries
	}
	if l.Ratio == 0 {
		l.Ratio = defaultRatio
	}
	return l
}

// Layer is where a plain archive is in the file of a [Writer], in bytes. Offset is a whole number of
// blocks of 4 KiB, Length one of 512 bytes.
type Layer struct{ Offset, Length int64 }

// Writer writes plain archives into a file, one behind the other.
type Writer struct {
	dst    *os.File
	limits Limits
	end    int64 // of the last archive
	scan   scanner
}

// NewWriter returns a Writer for an empty file.
func NewWriter(dst *os.File, limits Limits) *Writer {
	limits = limits.withDefaults()
	return &Writer{dst: dst, limits: limits, scan: scanner{most: limits.Entries, dirs: map[uint64]struct{}{}}}
}

// Summary says what was found in all archives until now.
func (w *Writer) Summary() Summary { return w.scan.Summary }

// Add reads src to its end, and writes it as a plain archive.
//
// Errors are [ErrDamaged], [ErrRefused], [ErrLimit], that of ctx, and those of reading src and writing the
// file, as they are. After an error the file must be discarded.
func (w *Writer) Add(ctx context.Context, src io.Reader) (Layer, error) {
	in := &source{ctx: ctx, r: src}
	plain, kind, err := decompress(in)
	if err != nil {
		return Layer{}, in.explain(err)
	}
	defer plain.Close()
	at := roundUp(w.end)
	out := &holes{f: w.dst, at: at}
	bounded := &bound{r: plain, in: in, kind: kind, left: w.limits.Bytes - at, limits: w.limits}
	tee := &tee{r: bounded, w: out}
	if err := w.scan.archive(tee); err != nil {
		return Layer{}, in.explain(err)
	}
	if err := out.flush(); err != nil {
		return Layer{}, err
	}
	// What follows the archive is not kept. The end of the compression has a checksum, though, and whoever
	// hashes src wants all of it.
	if _, err := io.Copy(io.Discard, bounded); err != nil {
		return Layer{}, in.explain(err)
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return Layer{}, err
	}
	w.end = at + tee.n
	return Layer{at, tee.n}, sparse.Extend(w.dst, roundUp(w.end))
}

// source is the compressed archive. It ends with ctx, and keeps its own errors apart from those of what
// it contains.
type source struct {
	ctx context.Context
	r   io.Reader
	n   int64 // bytes that were read
	err error
}

func (s *source) Read(b []byte) (int, error) {
	if err := context.Cause(s.ctx); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(b)
	s.n += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// explain returns why reading failed, in words for whoever made the archive.
func (s *source) explain(err error) error {
	var failed *writeError
	switch {
	case s.err != nil:
		return s.err
	case errors.As(err, &failed):
		return failed.error
	case errors.Is(err, ErrRefused), errors.Is(err, ErrLimit), errors.Is(err, ErrDamaged):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: it ends too early, after %s; copy it again", ErrDamaged, size.Format(s.n))
	case errors.Is(err, tar.ErrFieldTooLong):
		return fmt.Errorf("%w: an extended header has more than 1Mi", ErrRefused)
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("%w: it is no tar archive, or a header in it is broken, before byte %d", ErrDamaged, s.n)
	}
	return decompression(err, s.n)
}

// bound ends an archive that is larger than the limits allow.
type bound struct {
	r      io.Reader
	in     *source
	kind   string // of the compression; empty for none
	n      int64  // bytes of the plain archive
	left   int64
	limits Limits
}

func (b *bound) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.n += int64(n)
	if b.n > b.left {
		return n, fmt.Errorf("%w: it has more than %s when it is decompressed; make it smaller", ErrLimit,
			size.Format(b.limits.Bytes))
	}
	if b.kind != "" && b.n > ratioFree && (b.n-ratioFree)/b.limits.Ratio > b.in.n {
		return n, fmt.Errorf("%w: %s of it became more than %s, which is over %d times as much; "+
			"if that is right, give it uncompressed", ErrLimit, size.Format(b.in.n), size.Format(b.n), b.limits.Ratio)
	}
	return n, err
}

// tee writes what it reads. It fills the buffer, however little the reader has at a time.
type tee struct {
	r io.Reader
	w *holes
	n int64
	// zero says that the last read was of a header's size, and of zeros: see [scanner.archive].
	zero bool
}

func (t *tee) Read(p []byte) (int, error) {
	n, err := io.ReadFull(t.r, p)
	if n > 0 {
		t.zero = n == headerSize && isZero(p[:n])
		if err := t.w.write(p[:n]); err != nil {
			return n, &writeError{err}
		}
	}
	t.n += int64(n)
	if err == io.ErrUnexpectedEOF && n > 0 {
		err = io.EOF
	}
	return n, err
}

// writeError is an error of the file that is written, behind a parser that returns errors of its own.
type writeError struct{ error }
