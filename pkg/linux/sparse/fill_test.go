// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sparse

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestFill(t *testing.T) {
	const block = holeSize
	want := make([]byte, 5<<20+1000)
	for _, at := range []int{0, block - 1, 3 * block, 3<<20 - 1, 3 << 20, 5 << 20, len(want) - 1} {
		want[at] = 'x'
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := Fill(t.Context(), f, bytes.NewReader(want), 1<<20)
	if err := errors.Join(err, SetLength(f, 8<<20)); err != nil || n != int64(len(want)) {
		t.Fatalf("filled %d bytes: %v", n, err)
	}
	got, err := os.ReadFile(f.Name())
	all := slices.Concat(make([]byte, 1<<20), want, make([]byte, 2<<20-1000))
	if err != nil || !bytes.Equal(got, all) {
		t.Errorf("the content differs: %v", err)
	}
	var data int64
	for e, err := range Data(f) {
		if err != nil {
			t.Fatal(err)
		}
		data += e.End - e.Start
	}
	if data > 5*block+4096 {
		t.Errorf("%d bytes are data", data)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Fill(ctx, f, bytes.NewReader(want), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("with a canceled context: %v", err)
	}
}
