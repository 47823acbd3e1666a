// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fiemap

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"
)

func TestClosedFileIsAnErrorNotAnotherFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := Count(f); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Count of a closed file: %v", err)
	}
}

func TestLayout(t *testing.T) {
	if h, e := unsafe.Sizeof(header{}), unsafe.Sizeof(extent{}); h != 32 || e != 56 {
		t.Errorf("the Go structs have %d and %d bytes, struct fiemap has 32 and struct fiemap_extent 56", h, e)
	}
}
