// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"errors"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestBudget works in units of MiB, which the messages are in.
func TestBudget(t *testing.T) {
	const u = 1 << 20
	for name, c := range map[string]struct {
		budget
		left int64
	}{
		"empty":                               {budget{total: 100, available: 100, overcommit: 1}, 100},
		"headroom":                            {budget{total: 100, available: 100, headroom: 5, overcommit: 1}, 95},
		"thin claims, nothing written":        {budget{total: 100, available: 100, thin: 60, overcommit: 1}, 40},
		"thin claims, written in part":        {budget{total: 100, available: 70, thin: 60, overcommit: 1}, 40},
		"thin claims, overcommitted":          {budget{total: 100, available: 100, thin: 60, overcommit: 3}, 80},
		"overcommitted, but full":             {budget{total: 100, available: 10, thin: 60, overcommit: 3}, 10},
		"overcommitted, and headroom reached": {budget{total: 100, available: 10, headroom: 10, thin: 60, overcommit: 3}, 0},
		"more promised than there is":         {budget{total: 100, available: 100, thin: 160, overcommit: 1}, 0},
		"firm ones do not shrink":             {budget{total: 100, available: 40, firm: 60, overcommit: 3}, 40},
		"snapshots that share all":            {budget{total: 100, available: 70, thin: 60, firm: 30, overcommit: 1}, 10},
		"others":                              {budget{total: 100, available: 75, others: 25, thin: 50, overcommit: 1}, 25},
	} {
		t.Run(name, func(t *testing.T) {
			b := c.budget
			for _, f := range []*int64{&b.total, &b.available, &b.headroom, &b.thin, &b.firm, &b.others} {
				*f *= u
			}
			if got := b.left() / u; got != c.left {
				t.Errorf("%d are left, not %d: %s", got, c.left, b)
			}
			// What is left can be had, and no more.
			for provisioning, share := range map[image.Provisioning]float64{image.Thick: 1, image.Thin: b.overcommit} {
				most := int64(float64(b.left()) * share)
				if err := b.refuse(Claim("", most, provisioning)); err != nil {
					t.Errorf("%s: all that is left: %v", provisioning, err)
				}
				err := b.refuse(Claim("", most+int64(share+1)*u, provisioning))
				if !errors.Is(err, pool.ErrFull) {
					t.Errorf("%s: more than is left: %v", provisioning, err)
				}
				t.Log(err)
			}
		})
	}
}
