// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Demand is the space that a new volume or snapshot needs in the pool, in bytes.
type Demand struct {
	Key  string // of the image that is being made; "" for one that exists and grows
	Thin int64  // promised, and subject to overcommit
	Firm int64  // promised, whatever else there is
	Now  int64  // taken at once

	reserved bool // in all layers
}

func (d *Demand) held() held { return held{thin: d.Thin, firm: d.Firm} }

// Claim is the demand of a new claim of the given bytes, or of one that grows by them.
func Claim(key string, bytes int64, p image.Provisioning) Demand {
	d := Demand{Key: key, reserved: p.Reserves()}
	d.Thin, d.Firm, d.Now = p.Promise(bytes)
	return d
}

// budget is what the pool has, and what it has promised, in bytes.
type budget struct {
	total, available, headroom int64
	thin                       int64 // thin claims, by size
	firm                       int64 // thick claims by size, snapshots by what they may come to take
	others                     int64 // everything else, by what it takes now; see [others]
	overcommit                 float64
	limit                      string // the layer below the pool that has less room than the pool; see [pool.Space]
}

// left is what can still be promised firmly.
func (b budget) left() int64 {
	unpromised := b.total - b.headroom - b.others - b.firm - int64(float64(b.thin)/b.overcommit)
	return max(0, min(b.free(), unpromised))
}

// free is what can be taken at once.
func (b budget) free() int64 { return max(0, b.available-b.headroom) }

// largest is the size of the largest claim that can still be promised.
func (b budget) largest(p image.Provisioning) int64 {
	left := b.left()
	if thin, _, _ := p.Promise(1); thin > 0 {
		return int64(float64(left) * b.overcommit)
	}
	return left
}

// refuse returns [pool.ErrFull], with the figures, for a demand that is too large.
func (b budget) refuse(d Demand) error {
	if float64(d.Firm)+float64(d.Thin)/b.overcommit > float64(b.left()) {
		left := b.left()
		if d.Thin > 0 {
			left = int64(float64(left) * b.overcommit)
		}
		return fmt.Errorf("%w: %s is asked for, and %s can be promised; ask for less, delete claims or snapshots, or have the operator %s, %s, or raise --overcommit: %s",
			pool.ErrFull, size.Format(d.Firm+d.Thin), size.Format(left), enlarge(b.limit), pool.DropTemplates(), b)
	}
	if d.Now > b.free() {
		return fmt.Errorf("%w: %s is needed at once, and %s can be taken; ask for less, delete volumes, or have the operator %s, or %s: %s",
			pool.ErrFull, size.Format(d.Now), size.Format(b.free()), enlarge(b.limit), pool.DropTemplates(), b)
	}
	return nil
}

// enlarge is how the pool gets more room.
func enlarge(limit string) string {
	if limit == "" {
		return "enlarge the pool"
	}
	return "make room on the filesystem below the pool"
}

func (b budget) String() string {
	text := fmt.Sprintf("of %s, %s are free, %s of it headroom; promised are %s to thin claims (--overcommit %g) and %s to thick claims and snapshots; %s are taken by inline volumes, templates, goldens and everything else",
		size.Format(b.total), size.Format(b.available), size.Format(b.headroom), size.Format(b.thin), b.overcommit, size.Format(b.firm), size.Format(b.others))
	if b.limit != "" {
		text += "; " + b.limit
	}
	return text
}
