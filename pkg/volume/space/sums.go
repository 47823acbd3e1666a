// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

// held is what one image has of the pool, in bytes.
type held struct {
	thin, firm int64 // promised; see [Demand]
	allocated  int64 // taken when it was looked at last
}

func (h held) plus(o held) held {
	return held{h.thin + o.thin, h.firm + o.firm, h.allocated + o.allocated}
}

func (h held) minus(o held) held {
	return held{h.thin - o.thin, h.firm - o.firm, h.allocated - o.allocated}
}

// sums add up what the images of claims and snapshots have, and the demands of those that are
// being made. They change with each of them.
type sums struct {
	total  held
	images map[string]*held // by key; never changed, but replaced
	making map[*Demand]bool // whether the demand counts
}

func newSums() sums { return sums{images: map[string]*held{}, making: map[*Demand]bool{}} }

// begin notes that an image is being made, which does not count yet.
func (s *sums) begin(d *Demand) { s.making[d] = false }

// count counts the demand of an image that is being made.
func (s *sums) count(d *Demand) {
	if !s.making[d] {
		s.making[d] = true
		s.total = s.total.plus(d.held())
	}
}

// end is called when an image was made, or will not be.
func (s *sums) end(d *Demand) {
	s.uncount(d)
	delete(s.making, d)
}

func (s *sums) uncount(d *Demand) {
	if s.making[d] {
		s.making[d] = false
		s.total = s.total.minus(d.held())
	}
}

// set enters an image that has its name. From here on its demand does not count any more.
func (s *sums) set(key string, h held) {
	s.drop(key)
	s.images[key] = &h
	s.total = s.total.plus(h)
	if d := s.makes(key); d != nil {
		s.uncount(d)
	}
}

// drop removes an image that has lost its name.
func (s *sums) drop(key string) {
	if h := s.images[key]; h != nil {
		delete(s.images, key)
		s.total = s.total.minus(*h)
	}
}

// makes returns the demand of an image that is being made, or nil. It looks at as many as are
// being made at the moment.
func (s *sums) makes(key string) *Demand {
	for d := range s.making {
		if d.Key == key {
			return d
		}
	}
	return nil
}
