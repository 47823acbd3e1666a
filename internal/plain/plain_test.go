// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package plain

import "testing"

func TestFaults(t *testing.T) {
	for message, n := range map[string]int{
		`--accel "warp": must be one of auto, kvm, tcg`:                                  0,
		`invalid request: parameter "[strconv] map[a:b] %!s": unknown; allowed are a, b`: 0,
		`--x "\"": strconv.ParseInt: parsing "\"": invalid syntax`:                       2,
		`must be one of [filesystem diskImage]`:                                          1,
		`content is {ext4 1048576 map[]}, asked for nothing`:                             3,
		`--pool: %!s(<nil>)`: 2,
		`json: cannot unmarshal string into Go struct field Record.version of type int`:    4,
		`pool is full: no space left on device; pool is full: delete volumes`:              1,
		`size out of range: 1Mi is outside the limits of ext4, 9Mi to 8Ti; ask for a size`: 0,
		`*errors.errorString: x`: 1,
	} {
		if got := Faults(message); len(got) != n {
			t.Errorf("%s\nhas the faults %q, want %d", message, got, n)
		}
	}
}
