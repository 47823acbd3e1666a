// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"fmt"
	"os"
	"unsafe"
)

const fiTrim = 0xc0185879 // _IOWR('X', 121, struct fstrim_range), linux/fs.h

// Trim discards the free space of f's filesystem, in ranges of at least minimum bytes. A loop
// device punches holes into its file there, so the space is returned to the filesystem that
// holds the file. A device that accepts no discards returns [errors.ErrUnsupported].
//
// "fstrim is used on a mounted filesystem to discard (or "trim") blocks which are not in use
// by the filesystem." fstrim(8), which makes this call, FITRIM
func Trim(f *os.File, minimum int64) error {
	r := struct{ start, length, minimum uint64 }{length: ^uint64(0), minimum: uint64(minimum)}
	err := ioctlPtr("FITRIM", f, fiTrim, unsafe.Pointer(&r))
	if err != nil {
		return fmt.Errorf("FITRIM %s: %w", f.Name(), err)
	}
	return nil
}
