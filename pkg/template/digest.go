// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
)

// digest returns the SHA-256 of an image's content: see [sparse.Hash]. An empty filesystem takes milliseconds
// at any size.
func digest(f *os.File) (string, error) {
	h := sha256.New()
	err := sparse.Hash(context.Background(), h, f)
	return hex.EncodeToString(h.Sum(nil)), err
}
