// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"time"
)

// Figures are the pool's promises and its sharing in numbers, in bytes.
type Figures struct {
	Thin, Firm int64 // promised: see [Demand]
	Headroom   int64 // what new volumes leave free
	// Overcommit is how many times its own size the pool promises to thin claims.
	Overcommit float64
	// Allocated is what all images have allocated. Extents that several of them share count several times.
	Allocated int64
	// Shared is what sharing saves, at least: Allocated without what is taken of the pool.
	Shared int64
}

// Figures returns the figures of this moment. Allocated and Shared are up to a minute old, so that reading the figures
// often does not look at all images each time.
func (s *Space) Figures() (Figures, error) {
	m, err := s.lately()
	if err != nil {
		return Figures{}, err
	}
	has, err := s.has()
	if err != nil {
		return Figures{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return Figures{
		Thin: s.sums.total.thin, Firm: s.sums.total.firm, Headroom: s.headroom(has), Overcommit: s.cfg.Overcommit,
		Allocated: m.allocated, Shared: max(0, m.allocated-used(m.has)),
	}, nil
}

// lately returns a measurement that need not be the newest.
func (s *Space) lately() (measurement, error) {
	now := time.Now()
	s.mu.Lock()
	m := s.measured
	s.mu.Unlock()
	if now.Before(m.start.Add(Rest(m.took))) {
		return m, nil
	}
	return s.measure(now)
}

// Rest is how long figures are kept that took so long to find: a minute at most, and less if they are found so fast that
// it takes a sixtieth of a percent of the time. 100 images take 0.1 ms, and 10,000 take 10 ms.
func Rest(took time.Duration) time.Duration { return min(time.Minute, 6000*took) }
