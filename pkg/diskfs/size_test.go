// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"1": 1, "512Mi": 512 << 20, "1500M": 1_500_000_000, "1.5Gi": 3 << 29, "1e3": 1000, "100m": 1, "0": 0, "-1Gi": -1 << 30,
		"1e30": math.MaxInt64, "-1e30": math.MinInt64, "18446744074783293440": math.MaxInt64, "-1e-10": 0,
	} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "x", "1 Gi", "1GiB", "Mi", "1e", "0x10", "1,5Gi", "١", strings.Repeat("9", 600)} {
		if got, err := ParseSize(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseSize(%.20q) = %d, %v", s, got, err)
		}
	}
}

// TestParseSizeReturns asks for exponents that a pod may write and that
// resource.ParseQuantity computes with for minutes.
func TestParseSizeReturns(t *testing.T) {
	for _, s := range []string{"1e999999999", "1e-999999999", "1E99999999"} {
		start := time.Now()
		if _, err := ParseSize(s); !errors.Is(err, ErrInvalid) || time.Since(start) > time.Second {
			t.Errorf("%q: %v after %s", s, err, time.Since(start))
		}
	}
}
