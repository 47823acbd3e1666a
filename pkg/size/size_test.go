// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package size

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
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("Parse(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "x", "1 Gi", "1GiB", "Mi", "1e", "0x10", "1,5Gi", "١", strings.Repeat("9", 600)} {
		if got, err := Parse(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("Parse(%.20q) = %d, %v", s, got, err)
		}
	}
}

// TestHint checks what is said to those who write a size in another way, and that the
// quantities named are such.
func TestHint(t *testing.T) {
	for s, want := range map[string]string{
		"10GB":    "; did you mean 10G (10,000,000,000 bytes) or 10Gi (10,737,418,240 bytes)?",
		"10gb":    "; did you mean 10G (10,000,000,000 bytes) or 10Gi (10,737,418,240 bytes)?",
		"10g":     "; did you mean 10G (10,000,000,000 bytes) or 10Gi (10,737,418,240 bytes)?",
		"10 GB":   "; did you mean 10G (10,000,000,000 bytes) or 10Gi (10,737,418,240 bytes)?",
		"1.5TB":   "; did you mean 1.5T (1,500,000,000,000 bytes) or 1.5Ti (1,649,267,441,664 bytes)?",
		"64K":     "; did you mean 64k (64,000 bytes) or 64Ki (65,536 bytes)?",
		"9EB":     "; did you mean 9E (9,000,000,000,000,000,000 bytes) or 9Ei?",
		"10GiB":   "; did you mean 10Gi?",
		"10 Gi":   "; did you mean 10Gi?",
		" 10Gi":   "; did you mean 10Gi?",
		"512mi":   "; did you mean 512Mi?",
		"64kib":   "; did you mean 64Ki?",
		"4096B":   "; did you mean 4096?",
		"4 bytes": "; did you mean 4?",
		"lots":    "", "": "", "GB": "", "10Gbit": "", "-10GB": "", "10i": "", "1.2.3GB": "", "10GB\n": "", strings.Repeat("9", 600) + "GB": "",
	} {
		if got := Hint(s); got != want {
			t.Errorf("Hint(%.20q) = %q, want %q", s, got, want)
		}
		_, err := Parse(s)
		if err == nil || !strings.HasSuffix(err.Error(), "10Gi"+want) {
			t.Errorf("Parse(%.20q) returned %v", s, err)
		}
		for word := range strings.FieldsFuncSeq(want, func(r rune) bool { return r == ' ' || r == '?' }) {
			if word[0] < '0' || word[0] > '9' {
				continue
			}
			if _, err := Parse(word); err != nil {
				t.Errorf("Hint(%q) names %s: %v", s, word, err)
			}
		}
	}
	for _, s := range []string{"0", "4096", "10G", "10Gi", "1e3"} { // what is refused for its value
		if got := Hint(s); got != "" {
			t.Errorf("Hint(%q) = %q", s, got)
		}
	}
}

// TestParseSizeReturns asks for exponents that a pod may write and that
// resource.ParseQuantity computes with for minutes.
func TestParseSizeReturns(t *testing.T) {
	for _, s := range []string{"1e999999999", "1e-999999999", "1E99999999"} {
		start := time.Now()
		if _, err := Parse(s); !errors.Is(err, ErrInvalid) || time.Since(start) > time.Second {
			t.Errorf("%q: %v after %s", s, err, time.Since(start))
		}
	}
}

// TestFormat checks that sizes look as people write them, and that two sizes that can be
// asked for never look alike.
func TestFormat(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 bytes", 1: "1 bytes", 1023: "1023 bytes", 1024: "1Ki", 1536: "1.5Ki", MiB - 1: "1023.9Ki",
		9 * MiB: "9Mi", 1025 * MiB: "1025Mi", 20 * GiB: "20Gi", 8 << 40: "8Ti", (1<<32 - 1) << 20: "4294967295Mi", 1 << 52: "4Pi",
		20153630720: "19220Mi", 20153630721: "18.7Gi", math.MaxInt64: "7.9Ei", -9 * MiB: "-9Mi", math.MinInt64: "-7.9Ei", GiB + 1: "1Gi",
	} {
		if got := Format(bytes); got != want {
			t.Errorf("Format(%d) = %q, want %q", bytes, got, want)
		}
	}
	seen := map[string]int64{}
	for mebibytes := int64(1); mebibytes < 1<<17; mebibytes++ {
		s := Format(mebibytes * MiB)
		if other, twice := seen[s]; twice {
			t.Fatalf("%d MiB and %d MiB are both %q", other, mebibytes, s)
		}
		seen[s] = mebibytes
		if back, err := Parse(s); err != nil || back != mebibytes*MiB {
			t.Fatalf("Format wrote %q, Parse read %d, %v", s, back, err)
		}
	}
}

func TestParseShare(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "0%": 0, "5%": 50, "12.5%": 125, "99.9%": 999, "10": 10, "1Ki": 1024,
	} {
		h, err := ParseShare(s)
		if got := h.Of(1000); err != nil || got != want {
			t.Errorf("%q of 1000 is %d, not %d: %v", s, got, want, err)
		}
		if again, err := ParseShare(h.String()); err != nil || again != h {
			t.Errorf("%q is written as %q, which is read as %v, %v", s, h, again, err)
		}
	}
	for _, s := range []string{"", "%", "-1%", "100%", "NaN%", "five%", "-1", "5 %", "lots"} {
		if _, err := ParseShare(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}
