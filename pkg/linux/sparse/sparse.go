// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package sparse finds out where a file has data, reserves space for files, and copies
// the data.
//
// Caveat: preallocated space that was never written counts as a hole, on btrfs and on
// xfs. So a copy of a preallocated file has its content, and not its space.
//
// Sources: SEEK_DATA and SEEK_HOLE in lseek(2), fallocate(2).
package sparse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Extent is a range of a file, in bytes.
type Extent struct{ Start, End int64 }

// Data yields the ranges of f that may hold something other than zeros, in order. It
// moves f's offset. An error is the last thing it yields.
func Data(f *os.File) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		for pos := int64(0); ; {
			start, err := f.Seek(pos, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // no data after pos
				return
			}
			end := start
			if err == nil {
				end, err = f.Seek(start, unix.SEEK_HOLE)
			}
			if !yield(Extent{start, end}, err) || err != nil {
				return
			}
			pos = end
		}
	}
}

// Reserve makes sure that the first size bytes of f have space, without changing their
// content. A smaller f becomes size bytes large. Where f has its space already, Reserve does
// nothing, which takes some microseconds. Space that f shares with another file counts
// too, although a write there needs new space.
//
// "After a successful call, subsequent writes into the range specified by offset
// and len are guaranteed not to fail because of lack of disk space." fallocate(2)
func Reserve(f *os.File, size int64) error {
	if err := sys.Effect("fallocate", f, func(fd int) error { return unix.Fallocate(fd, 0, 0, size) }); err != nil {
		return fmt.Errorf("fallocate %s to %d bytes: %w", f.Name(), size, err)
	}
	return nil
}

// ReserveRange is [Reserve] for a part of f that lies within its length.
//
// "If the FALLOC_FL_KEEP_SIZE flag is specified in mode, the behavior of the call is similar,
// but the file size will not be changed" fallocate(2)
func ReserveRange(f *os.File, e Extent) error {
	err := sys.Effect("fallocate", f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, e.Start, e.End-e.Start)
	})
	if err != nil {
		return fmt.Errorf("fallocate %s from byte %d to %d: %w", f.Name(), e.Start, e.End, err)
	}
	return nil
}

// Extend makes f larger, by a hole at its end, and never smaller.
//
// "If the file previously was shorter, it is extended, and the extended part reads as null
// bytes" ftruncate(2)
func Extend(f *os.File, size int64) error {
	fi, err := f.Stat()
	if err != nil || fi.Size() >= size {
		return err
	}
	if err := sys.Effect("ftruncate", f, func(fd int) error { return unix.Ftruncate(fd, size) }); err != nil {
		return fmt.Errorf("ftruncate %s to %d bytes: %w", f.Name(), size, err)
	}
	return nil
}

// SetLength makes f exactly size bytes long. It cuts off what is longer, and extends what is
// shorter by a hole. A file that has this length is left alone.
//
// "If the file previously was larger than this size, the extra data is lost." ftruncate(2)
func SetLength(f *os.File, size int64) error {
	fi, err := f.Stat()
	if err != nil || fi.Size() == size {
		return err
	}
	if err := sys.Effect("ftruncate", f, func(fd int) error { return unix.Ftruncate(fd, size) }); err != nil {
		return fmt.Errorf("ftruncate %s to %d bytes: %w", f.Name(), size, err)
	}
	return nil
}

// Copy writes the data of src to dst, at the same offsets, and leaves the rest of dst as
// it is. It shares no extents.
func Copy(ctx context.Context, dst, src *os.File) error {
	return CopyBegin(ctx, dst, src, math.MaxInt64)
}

// CopyBegin is [Copy] for the first size bytes of src. It does not read the rest.
func CopyBegin(ctx context.Context, dst, src *os.File, size int64) error {
	buf := make([]byte, 1<<20)
	for e, err := range Data(src) {
		if err != nil {
			return err
		}
		if e.Start >= size {
			return nil
		}
		e.End = min(e.End, size)
		if err := copyRange(ctx, dst, src, e, buf); err != nil {
			return err
		}
	}
	return nil
}

// CopyRange writes a range of src to dst, at the same offset. Holes in it are written as zeros. It
// shares no extents.
func CopyRange(ctx context.Context, dst, src *os.File, e Extent) error {
	return copyRange(ctx, dst, src, e, make([]byte, min(1<<20, max(0, e.End-e.Start))))
}

// copyRange is [CopyRange] with a buffer.
func copyRange(ctx context.Context, dst, src *os.File, e Extent, buf []byte) error {
	for at := e.Start; at < e.End; {
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("copying %s, at byte %d: %w", src.Name(), at, err)
		}
		n, err := src.ReadAt(buf[:min(int64(len(buf)), e.End-at)], at)
		if n == 0 && err == io.EOF { // src was truncated meanwhile
			return nil
		}
		if err != nil && err != io.EOF {
			return err
		}
		if err := write(dst, buf[:n], at); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// write is [os.File.WriteAt], which repeats pwrite(2) until all of b is written.
func write(f *os.File, b []byte, at int64) error {
	return sys.PathEffect("pwrite", func() error {
		_, err := f.WriteAt(b, at)
		return err
	})
}
