// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package space

import (
	"testing"
	"time"
)

// TestFiguresAreKept asks for the figures while a look at all images is fresh enough, and after that. Promises are those of
// the moment.
func TestFiguresAreKept(t *testing.T) {
	onPools(t, func(s space) {
		s.must("creating", s.create("a", 100*mib))
		s.measured = measurement{start: time.Now(), took: 10 * time.Millisecond, allocated: 7 * gib}
		f, err := s.Figures()
		if err != nil || f.Allocated != 7*gib || f.Shared != 7*gib || f.Thin != 100*mib || f.Firm != 0 {
			t.Errorf("%+v, %v", f, err)
		}
		s.measured.start = time.Now().Add(-time.Minute)
		if f, err = s.Figures(); err != nil || f.Allocated > mib || f.Shared > mib || f.Thin != 100*mib {
			t.Errorf("%+v, %v", f, err)
		}
		s.must("removing", s.images.Remove("a"))
	})
}
