// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bytes"
	"errors"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// blockSize is the block size of every filesystem that contents come from and go to.
const blockSize = 4 * size.KiB

func roundUp(n int64) int64 { return (n + blockSize - 1) / blockSize * blockSize }

// holes writes a file from an offset on, in pieces of a megabyte, and leaves out whole blocks of zeros.
type holes struct {
	f   *os.File
	at  int64  // offset of buf: a whole number of blocks
	buf []byte // not written yet
}

const pieceSize = size.MiB

func (h *holes) write(b []byte) error {
	for len(b) > 0 {
		n := min(len(b), pieceSize-len(h.buf))
		h.buf = append(h.buf, b[:n]...)
		b = b[n:]
		if len(h.buf) == pieceSize {
			if err := h.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush writes what is left. Only the last flush may be of a part of a block.
func (h *holes) flush() error {
	for start := 0; start < len(h.buf); {
		end := start
		for end < len(h.buf) && !isZero(h.block(end)) {
			end += len(h.block(end))
		}
		if end > start {
			if err := h.writeAt(h.buf[start:end], h.at+int64(start)); err != nil {
				return err
			}
		}
		for end < len(h.buf) && isZero(h.block(end)) {
			end += len(h.block(end))
		}
		start = end
	}
	h.at += int64(len(h.buf))
	h.buf = h.buf[:0]
	return nil
}

func (h *holes) block(at int) []byte { return h.buf[at:min(at+blockSize, len(h.buf))] }

func (h *holes) writeAt(b []byte, at int64) error {
	err := failpoint.Before("pwrite")
	if err == nil {
		_, err = h.f.WriteAt(b, at)
	}
	var path *os.PathError
	if err != nil && !errors.As(err, &path) {
		err = &os.PathError{Op: "pwrite", Path: h.f.Name(), Err: err}
	}
	return err
}

var zeros [blockSize]byte

// isZero reports whether a block has only zeros.
func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }
