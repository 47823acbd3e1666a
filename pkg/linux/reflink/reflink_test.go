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
)

func TestClosedFileIsAnErrorNotAnotherFile(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := Clone(f, f); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Clone of a closed file: %v", err)
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
			t.Errorf("%v is explained as %v; want %q, unsupported: %v", c.errno, err, c.text, c.unsupported)
		}
	}
}
