// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package size reads and writes amounts of space the way people do: as Kubernetes
// quantities ("10Gi") and as percentages of the pool ("5%").
//
// Every size in a flag, a pod's attribute or a message goes through this package, so that
// a message shows the user the same form that the user wrote.
//
// Source: "Quantity" in the Kubernetes API reference (k8s.io/apimachinery/pkg/api/resource).
package size

import (
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
)

// ErrInvalid means that a text is neither a quantity nor, where one is allowed, a percentage.
// The error does not repeat the text: the caller names it with the field that it is from.
var ErrInvalid = errors.New("invalid size")

// Units, in bytes.
const (
	KiB = 1 << 10
	MiB = 1 << 20
	GiB = 1 << 30
)

// quantity is what a size may look like. resource.ParseQuantity computes with
// the exponent it is given: at 1e999999999 it does not return.
var quantity = regexp.MustCompile(`^[+-]?[0-9.]{1,512}([numkKMGTPE]i?|[eE][+-]?[0-9]{1,2})?$`)

// Parse reads a Kubernetes quantity as bytes, rounded up to a whole byte. A value beyond
// the range of int64 becomes the nearest int64. Any other text returns [ErrInvalid].
func Parse(s string) (int64, error) {
	if bytes, ok := parse(s); ok {
		return bytes, nil
	}
	return 0, fmt.Errorf("%w: must be a quantity: a number with a unit, as 512Mi or 10Gi%s", ErrInvalid, Hint(s))
}

func parse(s string) (bytes int64, ok bool) {
	if !quantity.MatchString(s) {
		return 0, false
	}
	q, err := resource.ParseQuantity(s)
	if err != nil {
		return 0, false
	}
	if s[0] == '-' { // ParseQuantity reads -1e-10 as a positive billionth
		return min(0, clamp(q)), true
	}
	return clamp(q), true
}

// typed is a size in one of the other spellings that people use: "10GB", "10 GiB", "512mb".
// The number is short, since a message repeats it.
var typed = regexp.MustCompile(`^(?i) *([0-9]{1,12}(?:\.[0-9]{1,12})?) *([kmgtpe]?)(i?)(?:b|bytes?)? *$`)

// Hint is for the end of a message that refuses a text that is no quantity. It names the
// quantities that may be meant, or is empty: "; did you mean 10Gi?".
//
// People write GB for a power of 1000 and for a power of 1024. So it shows both, and nothing
// is guessed.
func Hint(s string) string {
	m := typed.FindStringSubmatch(s)
	if _, ok := parse(s); ok || m == nil {
		return ""
	}
	number, unit, binary := m[1], strings.ToUpper(m[2]), m[3] != ""
	switch {
	case unit == "" && binary:
		return ""
	case unit == "":
		return fmt.Sprintf("; did you mean %s?", number)
	case binary:
		return fmt.Sprintf("; did you mean %s%si?", number, unit)
	}
	decimal := number + strings.Replace(unit, "K", "k", 1) // Kubernetes writes k, and Ki
	return fmt.Sprintf("; did you mean %s%s or %s%si%s?", decimal, exactly(decimal), number, unit, exactly(number+unit+"i"))
}

// exactly spells a quantity out: " (10,000,000,000 bytes)". It is empty for one that is too
// large for that.
func exactly(quantity string) string {
	bytes, ok := parse(quantity)
	if !ok || bytes == math.MaxInt64 {
		return ""
	}
	digits := strconv.FormatInt(bytes, 10)
	for at := len(digits) - 3; at > 0; at -= 3 {
		digits = digits[:at] + "," + digits[at:]
	}
	return " (" + digits + " bytes)"
}

// clamp returns the quantity's value, or the nearest int64. Quantity.Value would return
// the low bits of a larger value, which may look harmless.
func clamp(q resource.Quantity) int64 {
	switch {
	case q.CmpInt64(math.MaxInt64) > 0:
		return math.MaxInt64
	case q.CmpInt64(math.MinInt64) < 0:
		return math.MinInt64
	}
	return q.Value()
}

var units = []string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}

// Format writes a number of bytes for a message: "9Mi", "8Ti", "18.7Gi", "512 bytes".
// A whole number of MiB is exact, so that two sizes that differ also look different. Any
// other size is rounded down to a tenth of its unit, so that free space is not overstated.
func Format(bytes int64) string {
	if bytes < 0 {
		return "-" + Format(-max(bytes, -math.MaxInt64))
	}
	if bytes%MiB == 0 && bytes > 0 {
		unit := 2
		for bytes /= MiB; bytes%1024 == 0; bytes /= 1024 {
			unit++
		}
		return strconv.FormatInt(bytes, 10) + units[unit]
	}
	if bytes < KiB {
		return strconv.FormatInt(bytes, 10) + " bytes"
	}
	unit, tenths := 1, bytes/KiB*10+bytes%KiB*10/KiB
	for ; tenths >= 10240; tenths /= 1024 {
		unit++
	}
	if tenths%10 == 0 {
		return strconv.FormatInt(tenths/10, 10) + units[unit]
	}
	return fmt.Sprintf("%d.%d%s", tenths/10, tenths%10, units[unit])
}

// Share is an amount of the pool's space: a number of bytes, or a percentage of the pool.
// The zero value is nothing.
type Share struct {
	Bytes   int64
	Percent float64
}

// ParseShare reads a quantity that is not negative ("10Gi") or a percentage below 100
// ("5%"). Any other text returns [ErrInvalid].
func ParseShare(s string) (Share, error) {
	if number, ok := strings.CutSuffix(s, "%"); ok {
		p, err := strconv.ParseFloat(number, 64)
		if err != nil || !(p >= 0 && p < 100) {
			return Share{}, fmt.Errorf("%w: a percentage must be from 0%% to less than 100%%", ErrInvalid)
		}
		return Share{Percent: p}, nil
	}
	bytes, err := Parse(s)
	if err == nil && bytes < 0 {
		err = fmt.Errorf("%w: must not be negative", ErrInvalid)
	}
	return Share{Bytes: bytes}, err
}

// Of returns the share in bytes of a pool of total bytes.
func (s Share) Of(total int64) int64 { return s.Bytes + int64(s.Percent/100*float64(total)) }

// String writes the share as [ParseShare] reads it.
func (s Share) String() string {
	if s.Percent > 0 {
		return strconv.FormatFloat(s.Percent, 'g', -1, 64) + "%"
	}
	if s.Bytes == 0 {
		return "0"
	}
	return resource.NewQuantity(s.Bytes, resource.BinarySI).String()
}
