// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
)

const digestBlock = 4096

// digest returns the SHA-256 of an image's content: of the offset and the bytes of each block
// that is not all zeros. It skips holes, and so takes milliseconds at any size. Blocks of zeros
// count as holes, so the digest does not depend on how the pool's filesystem stores them.
func digest(f *os.File) (string, error) {
	h := sha256.New()
	zero := make([]byte, digestBlock)
	buf := make([]byte, 64*digestBlock) // for each of the templates that are built at once
	var at [8]byte
	for e, err := range sparse.Data(f) {
		if err != nil {
			return "", err
		}
		for pos := e.Start - e.Start%digestBlock; pos < e.End; {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), e.End-pos)], pos)
			if err != nil && err != io.EOF {
				return "", err
			}
			if n == 0 {
				break // the file was truncated meanwhile: its size was checked before
			}
			for b := buf[:n]; len(b) > 0; {
				block := b[:min(digestBlock, len(b))]
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
	return hex.EncodeToString(h.Sum(nil)), nil
}
