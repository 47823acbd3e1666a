// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"testing"
	"time"
)

func TestParseStats(t *testing.T) {
	want := Stats{Reads: 7, ReadBytes: 64 * 512, Writes: 9, WrittenBytes: 128 * 512, Busy: 11 * time.Millisecond}
	for _, text := range []string{
		"       7        1       64        3        9        2      128        5        0       11        8\n", // before 4.18
		"7 1 64 3 9 2 128 5 0 11 8 0 0 0 0 4 2\n",                                                              // with discards and flushes
	} {
		if got, err := parseStats(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "1 2 3", "7 1 64 3 9 2 128 5 0", "7 1 64 3 -9 2 128 5 0 11 8"} {
		if got, err := parseStats(text); err == nil {
			t.Errorf("%q is %+v", text, got)
		}
	}
	if sum := want.Plus(want).Minus(want); sum != want {
		t.Errorf("%+v", sum)
	}
}
