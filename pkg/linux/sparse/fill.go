// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sparse

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
)

// holeSize is the least run of zeros that becomes a hole, in bytes. Each hole adds an extent, for which
// every clone of the file pays 10 to 24 µs; smaller holes would save little space for that.
const holeSize = 64 << 10

var zeros [holeSize]byte

// Fill writes what src reads to dst, from a byte on, and leaves blocks of zeros as holes. dst must have
// nothing but holes there. It returns how many bytes src had. It does not set dst's
// length: [SetLength] does, for the hole at the end.
func Fill(ctx context.Context, dst *os.File, src io.Reader, at int64) (n int64, err error) {
	buf := make([]byte, 1<<20)
	for {
		if err := context.Cause(ctx); err != nil {
			return n, fmt.Errorf("filling %s, at byte %d: %w", dst.Name(), at+n, err)
		}
		got, err := io.ReadFull(src, buf)
		if e := writeData(dst, buf[:got], at+n); e != nil {
			return n, e
		}
		n += int64(got)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// writeData writes the blocks of b that are not zeros, in runs that are as long as they can be.
func writeData(dst *os.File, b []byte, at int64) error {
	for len(b) > 0 {
		skip, run := 0, 0
		for skip < len(b) && isZero(b[skip:min(skip+holeSize, len(b))]) {
			skip = min(skip+holeSize, len(b))
		}
		b, at = b[skip:], at+int64(skip)
		for run < len(b) && !isZero(b[run:min(run+holeSize, len(b))]) {
			run = min(run+holeSize, len(b))
		}
		if run > 0 {
			if err := write(dst, b[:run], at); err != nil {
				return err
			}
		}
		b, at = b[run:], at+int64(run)
	}
	return nil
}

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }
