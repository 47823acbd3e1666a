// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"fmt"
	"math"
	"os"
	"unsafe"
)

const fiTrim = 0xc0185879 // _IOWR('X', 121, struct fstrim_range), linux/fs.h

// Range is a part of a filesystem, in bytes.
type Range struct{ Start, Length int64 }

// Everything is the whole of a filesystem, however large it is.
var Everything = Range{Length: math.MaxInt64}

// Trim discards the free space in a part of f's filesystem, in ranges of at least minimum bytes.
// A loop device punches holes into its file there, so the space is returned to the filesystem
// that holds the file. A device that accepts no discards returns [errors.ErrUnsupported].
//
// "fstrim is used on a mounted filesystem to discard (or "trim") blocks which are not in use
// by the filesystem." fstrim(8), which makes this call, FITRIM
func Trim(f *os.File, part Range, minimum int64) error {
	r := struct{ start, length, minimum uint64 }{uint64(part.Start), uint64(part.Length), uint64(minimum)}
	err := ioctlPtr("FITRIM", f, fiTrim, unsafe.Pointer(&r))
	if err != nil {
		return fmt.Errorf("FITRIM %s: %w", f.Name(), err)
	}
	return nil
}
