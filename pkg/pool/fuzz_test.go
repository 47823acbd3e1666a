// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

// FuzzRecord reads the value of an image's attribute, and writes again what it read.
func FuzzRecord(f *testing.F) {
	f.Add(`{"version":2,"id":"v"}`)
	f.Add(`[1e400]`)
	f.Add(`"` + strings.Repeat("<", 4000) + `"`)
	f.Fuzz(func(t *testing.T, text string) {
		var v, again any
		if err := decode([]byte(text), &v); err != nil {
			if !errors.Is(err, ErrNoRecord) {
				t.Error(err)
			}
			return
		}
		b, err := encode(v)
		if err != nil { // it is too long, so it is never written
			return
		}
		if err := decode(b, &again); err != nil || len(b) > maxRecord || !reflect.DeepEqual(v, again) {
			t.Errorf("%q was read as %v, and after it was written again as %v: %v", text, v, again, err)
		}
	})
}
