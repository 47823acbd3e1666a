// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import "github.com/csi-disktemplate/csi-disktemplate/pkg/size"

// ParseSize reads the size of an image as a Kubernetes quantity, rounds it up to whole
// MiB, and checks it against the filesystem's limits. Errors are [size.ErrInvalid] and
// [ErrOutOfRange].
func (fs *Filesystem) ParseSize(s string) (int64, error) {
	bytes, err := size.Parse(s)
	if err != nil {
		return 0, err
	}
	if bytes > 0 {
		bytes = RoundUp(bytes)
	}
	return bytes, fs.checkSize(bytes)
}
