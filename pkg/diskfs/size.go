// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"fmt"
	"math"
	"regexp"

	"k8s.io/apimachinery/pkg/api/resource"
)

// quantity is what a size may look like. resource.ParseQuantity computes with
// the exponent it is given: at 1e999999999 it does not return.
var quantity = regexp.MustCompile(`^[+-]?[0-9.]{1,512}([numkKMGTPE]i?|[eE][+-]?[0-9]{1,2})?$`)

// ParseSize reads a Kubernetes quantity as bytes, rounded up to whole ones. What
// no int64 holds becomes the nearest that one does. The error for anything else is [ErrInvalid].
func ParseSize(s string) (int64, error) {
	if quantity.MatchString(s) {
		q, err := resource.ParseQuantity(s)
		if err == nil && s[0] == '-' { // it makes a billionth of 1 out of -1e-10
			return min(0, clamp(q)), nil
		}
		if err == nil {
			return clamp(q), nil
		}
	}
	return 0, fmt.Errorf("%w: %.32q is not a quantity; write a number with a unit, as 512Mi or 10Gi", ErrInvalid, s)
}

// clamp is the quantity's value, or the nearest that an int64 holds: of what is
// beyond, Value returns the low bits, which may look harmless.
func clamp(q resource.Quantity) int64 {
	switch {
	case q.CmpInt64(math.MaxInt64) > 0:
		return math.MaxInt64
	case q.CmpInt64(math.MinInt64) < 0:
		return math.MinInt64
	}
	return q.Value()
}

// ParseSize reads the size of an image, rounded up to whole MiB, and holds it
// against the filesystem's limits.
func (fs *Filesystem) ParseSize(s string) (int64, error) {
	size, err := ParseSize(s)
	if err != nil {
		return 0, err
	}
	if size > 0 {
		size = RoundUp(size)
	}
	return size, fs.CheckSize(size)
}
