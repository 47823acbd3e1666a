// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"os"
	"strings"
	"testing"
)

func TestID(t *testing.T) {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if id, err := ID(); err != nil || id != strings.TrimSpace(string(b)) || len(id) != 36 {
			t.Errorf("the id is %q, and the kernel says %q: %v", id, b, err)
		}
	}
}
