// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package space

import "testing"

// TestPromises asks for the promises without a look at the images, and then for what they have allocated.
func TestPromises(t *testing.T) {
	onPools(t, func(s space) {
		s.must("creating", s.create("a", 100*mib))
		p, err := s.Promises()
		if err != nil || p.Thin != 100*mib || p.Firm != 0 || p.Headroom != 0 || p.Overcommit != 1 || !s.measured.start.IsZero() {
			t.Errorf("%+v, %v", p, err)
		}
		if allocated, saved, err := s.Sharing(); err != nil || allocated > mib || saved > mib {
			t.Errorf("%d and %d, %v", allocated, saved, err)
		}
		s.must("removing", s.images.Remove("a"))
	})
}
