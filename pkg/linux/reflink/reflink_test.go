// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package reflink

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

func TestClosedFileIsAnErrorNotAnotherFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := Clone(f, f); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Clone: %v", err)
	}
	if _, err := Extents(f); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Extents: %v", err)
	}
}

func TestFiemapLayout(t *testing.T) {
	if size := unsafe.Sizeof(fiemap{}); size != 32 {
		t.Errorf("struct fiemap has 32 bytes, not %d", size)
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct {
		errno       syscall.Errno
		unsupported bool
		text        string
	}{
		{syscall.EOPNOTSUPP, true, "EOPNOTSUPP"},
		{syscall.ENOTTY, true, "ENOTTY"},
		{syscall.ENOSPC, false, "ENOSPC"},
		{syscall.EXDEV, false, "one filesystem"},
		{syscall.EINVAL, false, "chattr +C"},
	} {
		err := explain("FICLONE a to b", c.errno)
		if !errors.Is(err, c.errno) || errors.Is(err, ErrUnsupported) != c.unsupported || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v: %v", c.errno, err)
		}
	}
}
