// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sparse

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash"
	"io"
	"os"
)

const hashBlock = 4096

// Hash writes to h the offset, as 8 bytes in little endian, and the bytes of each block of 4 KiB of f that is
// not all zeros. It skips holes, and so its time is that of the data. Blocks of zeros count as holes, so the
// result does not depend on how a filesystem stores them. The length of f is not part of it. Hash moves f's
// offset.
func Hash(ctx context.Context, h hash.Hash, f *os.File) error {
	zero := make([]byte, hashBlock)
	buf := make([]byte, 64*hashBlock)
	var at [8]byte
	for e, err := range Data(f) {
		if err != nil {
			return err
		}
		for pos := e.Start - e.Start%hashBlock; pos < e.End; {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			n, err := f.ReadAt(buf[:min(int64(len(buf)), e.End-pos)], pos)
			if err != nil && err != io.EOF {
				return err
			}
			if n == 0 {
				break // the file was truncated meanwhile: that is for the caller to notice
			}
			for b := buf[:n]; len(b) > 0; {
				block := b[:min(hashBlock, len(b))]
				if !bytes.Equal(block, zero[:len(block)]) {
					binary.LittleEndian.PutUint64(at[:], uint64(pos))
					h.Write(at[:])
					h.Write(block)
				}
				b = b[len(block):]
				pos += int64(len(block))
			}
		}
	}
	return nil
}
