// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// Outdated is a kind of disk whose templates were all made by earlier formatters.
type Outdated struct {
	Spec diskfs.Spec
	Used time.Time // the last use of the latest one, to within an hour

	key   string // of the template that the formatter would make now
	bytes int64  // space that the latest one takes in the pool
}

// Outdated returns the kinds of disks that were used since a time, and whose templates were all made
// by earlier formatters, the most lately used first. There are as many as fit into half of
// [Config].Budget, and no more than BuildsPerHour. It reads no content.
func (s *Store) Outdated(since time.Time) ([]Outdated, error) {
	budget, err := s.budget()
	if err != nil {
		return nil, err
	}
	entries, err := s.entries(nil)
	if err != nil {
		return nil, err
	}
	var all []Outdated
	for _, e := range entries {
		if o, ok := s.outdated(e); ok {
			all = append(all, o)
		}
	}
	return mostLately(all, since, budget/2, s.cfg.BuildsPerHour), nil
}

// outdated looks at one template. One that cannot be read, or that is not valid any more, is passed
// over.
func (s *Store) outdated(e entry) (o Outdated, ok bool) {
	f, err := s.open(e.key)
	if err != nil {
		return o, false
	}
	defer f.Close()
	r, _, err := readRecord(f, e.key)
	if err != nil {
		return o, false
	}
	key, err := s.KeyOf(r.Spec)
	if err != nil {
		return o, false
	}
	o = Outdated{Spec: r.Spec, Used: e.used, key: key, bytes: e.bytes}
	return o, !s.exists(o.key)
}

// mostLately chooses the kinds that were used since a time, each once, the most lately used first: as
// many as fit into so many bytes, and at most so many; 0 means no limit.
func mostLately(all []Outdated, since time.Time, bytes int64, most int) (chosen []Outdated) {
	latest := slices.SortedStableFunc(slices.Values(all), func(a, b Outdated) int { return b.Used.Compare(a.Used) })
	seen := map[string]bool{}
	for _, o := range latest {
		if o.Used.Before(since) || most > 0 && len(chosen) == most {
			break
		}
		if seen[o.key] || o.bytes > bytes {
			continue
		}
		seen[o.key] = true
		bytes -= o.bytes
		chosen = append(chosen, o)
	}
	return chosen
}
