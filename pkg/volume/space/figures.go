// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import "time"

// Promises are what the pool has promised and may promise, in bytes.
type Promises struct {
	Thin, Firm int64 // see [Demand]
	Headroom   int64 // what new volumes leave free
	// Overcommit is how many times its own size the pool promises to thin claims.
	Overcommit float64
}

// Promises returns the promises of this moment. It looks at no image.
func (s *Space) Promises() (Promises, error) {
	has, err := s.has()
	if err != nil {
		return Promises{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return Promises{Thin: s.sums.total.thin, Firm: s.sums.total.firm, Headroom: s.headroom(has), Overcommit: s.cfg.Overcommit}, nil
}

// Sharing looks at all images. It returns what they have allocated, in bytes, where extents that several of them share
// count several times; and what sharing saves, at least: the first without what is taken of the pool.
func (s *Space) Sharing() (allocated, saved int64, err error) {
	m, err := s.measure(time.Now())
	return m.allocated, max(0, m.allocated-used(m.has)), err
}
