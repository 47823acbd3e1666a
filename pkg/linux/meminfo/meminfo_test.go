// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package meminfo

import "testing"

func TestAvailable(t *testing.T) {
	available, total, err := Available()
	if err != nil || available < 1<<20 || available > total || total < 64<<20 {
		t.Errorf("%d of %d bytes, %v", available, total, err)
	}
}

func TestField(t *testing.T) {
	const text = "MemTotal:       24683716 kB\nMemFree:         1234 kB\nOther: many kB\n"
	if got, err := field(text, "MemTotal"); got != 24683716<<10 || err != nil {
		t.Error(got, err)
	}
	for _, name := range []string{"MemAvailable", "Other", "Mem"} {
		if got, err := field(text, name); err == nil {
			t.Errorf("%s is %d", name, got)
		}
	}
}
