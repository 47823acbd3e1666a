// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// This file decides which generations go, and touches nothing.
//
// A namespace can neither fill what is there for goldens nor drive out another's. While all of it is taken, each
// owner has a right to an equal share. An owner is a namespace, or a shared golden. Whoever has more than
// that has borrowed it, and gives it back when another commits. So what an owner has within its share, nobody
// else takes from it.

// Limits bound the goldens of a node. 0 means no limit.
type Limits struct {
	Generations int           // of each golden
	Unused      time.Duration // after which a generation goes
	Golden      int64         // bytes of all generations of one golden
	Owner       int64         // bytes of all goldens of one namespace, or of one shared golden
	All         int64         // bytes
}

// owner is who has a share of the space: a namespace, or a shared golden.
func (n Name) owner() string {
	if n.Shared() {
		return "/" + n.Name
	}
	return n.Namespace
}

// Expired are the generations that go because nobody has used them for so long.
func (l Limits) Expired(all []Held, now time.Time) (gone []Held) {
	for _, h := range all {
		if l.Unused > 0 && now.Sub(h.Used) > l.Unused {
			gone = append(gone, h)
		}
	}
	return gone
}

// Admit decides which generations go when one more is made, with so many bytes. The new one is the newest of its
// golden. If it cannot have its space, the error is [errdefs.ErrLimit], and none goes.
func (l Limits) Admit(all []Held, of Name, bytes int64) (gone []Held, err error) {
	for _, limit := range []struct {
		bytes      int64
		what, flag string
	}{
		{l.Golden, "a golden may have", "--golden-max-bytes"},
		{l.Owner, "a namespace, and a shared golden, may have", "--golden-namespace-cache"},
		{l.All, "all goldens of a node may have", "--golden-cache"},
	} {
		if limit.bytes > 0 && bytes > limit.bytes {
			return nil, fmt.Errorf("%w: golden %s would have %s, and %s %s (%s); leave less in the volume, or raise that",
				errdefs.ErrLimit, of, size.Format(bytes), limit.what, size.Format(limit.bytes), limit.flag)
		}
	}
	c := collect(all, of, bytes)
	own := func(h Held) bool { return h.Name == of }
	mine := func(h Held) bool { return h.owner() == of.owner() }
	for l.Generations > 0 && c.count(own)+1 > l.Generations {
		c.drop(own)
	}
	for l.Golden > 0 && c.sum(own)+bytes > l.Golden {
		c.drop(own)
	}
	for l.Owner > 0 && c.sum(mine)+bytes > l.Owner {
		c.drop(mine)
	}
	for l.All > 0 && c.sum(everyone)+bytes > l.All {
		owner := c.largest()
		theirs := func(h Held) bool { return h.owner() == owner }
		if c.count(theirs) == 0 {
			return nil, fmt.Errorf("%w: golden %s would have %s; all goldens of this node may have %s (--golden-cache), and the other "+
				"namespaces have no more than an equal share of it; leave less in the volume, or raise that",
				errdefs.ErrLimit, of, size.Format(bytes), size.Format(l.All))
		}
		c.drop(theirs)
	}
	return c.gone, nil
}

func everyone(Held) bool { return true }

// collection is what stays while it is decided what goes.
type collection struct {
	left []Held // in the order in which they go
	gone []Held
	has  map[string]int64 // bytes of each owner, the new generation included
}

func collect(all []Held, of Name, bytes int64) *collection {
	c := &collection{left: order(all, of), has: map[string]int64{of.owner(): bytes}}
	for _, h := range all {
		c.has[h.owner()] += h.Bytes
	}
	return c
}

func (c *collection) count(which func(Held) bool) (n int) {
	for _, h := range c.left {
		if which(h) {
			n++
		}
	}
	return n
}

func (c *collection) sum(which func(Held) bool) (bytes int64) {
	for _, h := range c.left {
		if which(h) {
			bytes += h.Bytes
		}
	}
	return bytes
}

// largest is the owner that has most, the new generation included.
func (c *collection) largest() (owner string) {
	for o, bytes := range c.has {
		if owner == "" || cmp.Or(cmp.Compare(bytes, c.has[owner]), cmp.Compare(o, owner)) > 0 {
			owner = o
		}
	}
	return owner
}

// drop lets the first of some generations go. There is one whenever it is called: the new generation alone is
// within the limits.
func (c *collection) drop(which func(Held) bool) {
	i := slices.IndexFunc(c.left, which)
	first := c.left[i]
	c.left = slices.Delete(c.left, i, i+1)
	c.gone = append(c.gone, first)
	c.has[first.owner()] -= first.Bytes
}

// order puts generations in the order in which they go when one more is made of a golden. First come those that
// have a newer one, since nobody starts from them. Otherwise the one that was not used for longest comes first. Of
// one golden it is the older one, whatever their times say: the clock may have been set back.
func order(all []Held, of Name) []Held {
	type place struct {
		Held
		outdated int // 1, or else 0
		used     time.Time
	}
	newest := map[Name]int{of: math.MaxInt}
	places := make([]place, len(all))
	for i, h := range all {
		newest[h.Name] = max(newest[h.Name], h.Number)
		places[i] = place{Held: h, used: h.Used}
	}
	slices.SortFunc(places, func(a, b place) int { return a.Generation.compare(b.Generation) })
	for i := range places {
		if p := &places[i]; p.Number < newest[p.Name] {
			p.outdated = 1
		}
		if i > 0 && places[i-1].Name == places[i].Name && places[i].used.Before(places[i-1].used) {
			places[i].used = places[i-1].used
		}
	}
	slices.SortStableFunc(places, func(a, b place) int {
		return cmp.Or(cmp.Compare(b.outdated, a.outdated), a.used.Compare(b.used))
	})
	ordered := make([]Held, len(places))
	for i, p := range places {
		ordered[i] = p.Held
	}
	return ordered
}
