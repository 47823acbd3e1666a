// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// This file looks at images: at one whenever the Store changes it, at all of them when the
// plugin starts and in each sweep, and at the space of all when that is needed.

// Recount makes the sums agree with the images, and logs what was counted wrongly. An
// administrator may have added or removed an image.
func (s *Space) Recount() error {
	wrong, err := s.recount()
	if err != nil || len(wrong) == 0 {
		return err
	}
	slices.SortFunc(wrong, func(a, b mistake) int { return strings.Compare(a.key, b.key) })
	var was, is held
	for _, m := range wrong {
		was, is = was.plus(m.was), is.plus(m.is)
	}
	logs.Warn("Images were counted wrongly in what the pool has promised, and are counted anew; somebody else changed them",
		"images", len(wrong), "first", wrong[0].key, "thinWas", size.Format(was.thin), "thinIs", size.Format(is.thin), "firmWas", size.Format(was.firm), "firmIs", size.Format(is.firm))
	return nil
}

// mistake is an image that was counted wrongly. A zero value is an image that is not there.
type mistake struct {
	key     string
	was, is held
}

// recount looks at all images that are there or are counted.
func (s *Space) recount() (wrong []mistake, err error) {
	keys, err := s.keys()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	image.Each(len(keys), func(i int) {
		if m := s.look(keys[i], false); m != nil {
			mu.Lock()
			defer mu.Unlock()
			wrong = append(wrong, *m)
		}
	})
	return wrong, nil
}

// keys are those of all volumes and snapshots that are there, and of those that are counted.
func (s *Space) keys() ([]string, error) {
	volumes, err := s.pool.Volumes()
	if err != nil {
		return nil, err
	}
	snapshots, err := s.pool.Snapshots()
	if err != nil {
		return nil, err
	}
	var keys []string
	there := map[string]bool{}
	for _, id := range volumes {
		keys = append(keys, image.VolumeKey(id))
	}
	for _, id := range snapshots {
		keys = append(keys, image.SnapshotKey(id))
	}
	for _, key := range keys {
		there[key] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.sums.images {
		if !there[key] {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// changing is called by the Store before it changes an image, and changed afterwards. In
// between, nobody else can tell whether the image is counted wrongly.
func (s *Space) changing(key string) (changed func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes[key]++
	return func() {
		s.look(key, true)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.changes[key]--; s.changes[key] == 0 {
			delete(s.changes, key)
		}
	}
}

// look makes the sums agree with one image. It returns a mistake if the image was counted
// wrongly. While the image is being changed, only the one who changed it looks at it.
//
// Two looks at one image do not overlap: the later one must not be undone by the earlier one.
func (s *Space) look(key string, changed bool) *mistake {
	turn := &s.turns[maphash.String(s.seed, key)%uint64(len(s.turns))]
	turn.Lock()
	defer turn.Unlock()
	is, err := s.read(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changes[key] > 0 && !changed {
		return nil
	}
	was := s.sums.images[key]
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		s.sums.drop(key)
	case err != nil:
		klog.ErrorS(err, "An image cannot be read; it counts with what it was promised before, or else with the space that it takes", "image", key)
		if d := s.sums.makes(key); d != nil && was == nil {
			s.sums.set(key, d.held())
		}
		return nil
	default:
		s.sums.set(key, is)
	}
	return differ(key, was, s.sums.images[key])
}

// differ compares two promises. What a snapshot has allocated may change without anybody's
// doing: some of it was allocated ahead.
func differ(key string, was, is *held) *mistake {
	switch {
	case was == nil && is == nil:
		return nil
	case was == nil:
		return &mistake{key: key, is: *is}
	case is == nil:
		return &mistake{key: key, was: *was}
	case isSnapshot(key) || was.thin == is.thin && was.firm == is.firm:
		return nil
	}
	return &mistake{key, *was, *is}
}

// read looks at an image. It returns [errdefs.ErrNotFound] if there is no claim and no snapshot
// with this key.
func (s *Space) read(key string) (held, error) {
	id, snapshot := image.OfKey(key)
	stat := s.pool.StatVolume
	if snapshot {
		stat = s.pool.StatSnapshot
	}
	st, err := stat(id)
	if errors.Is(err, os.ErrNotExist) {
		return held{}, fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil || snapshot {
		return ofSnapshot(st.Allocated), err
	}
	r, err := s.images.GetClaim(id)
	h := held{allocated: st.Allocated}
	h.thin, h.firm, _ = r.Provisioning.Promise(r.Spec.Size)
	return h, err
}

func isSnapshot(key string) bool {
	_, snapshot := image.OfKey(key)
	return snapshot
}

// ofSnapshot is what a snapshot has. Once its claim has overwritten everything, it has all
// that it has allocated to itself.
func ofSnapshot(allocated int64) held { return held{firm: allocated, allocated: allocated} }

// measurement is what was found when all images were looked at.
type measurement struct {
	has    pool.Space
	others int64 // see [others]
	images int   // how many were looked at
	// allocated is what all images had allocated; shared extents count in each.
	allocated int64
	start     time.Time
	took      time.Duration
}

// A measurement of this many images is not kept: looking at them takes 0.1 ms.
const few = 100

// restFactor is how many times as long as a measurement took it is kept, so that measuring takes
// 1 % of the time at most. 10,000 images take 10 ms, which are kept for 1 s.
const restFactor = 100

// fresh reports whether a measurement need not be made again yet.
func (m measurement) fresh(now time.Time) bool {
	return m.images > few && now.Before(m.start.Add(restFactor*m.took))
}

// others is what all but claims and snapshots take of the pool, in bytes. used is what is taken
// of it, and ours what claims and snapshots have allocated. They share extents with each other,
// which count several times, so that the difference is a lower bound. Another one is what inline
// volumes, templates and goldens have allocated, known. They share extents too, and so it can be more
// than is taken at all.
func others(used, ours, known int64) int64 { return min(used, max(known, used-ours)) }

// used is what is taken of the pool, in bytes.
func used(has pool.Space) int64 { return max(0, has.Total-has.Available) }

// has asks the pool for its space.
func (s *Space) has() (pool.Space, error) {
	if err := s.pool.Check(); err != nil {
		return pool.Space{}, err
	}
	return s.pool.Space()
}

// kept returns the latest measurement, or a new one if it is too old. Claims may have been
// written to since. So what is taken by now counts as that of others, until it is measured.
func (s *Space) kept() (measurement, error) {
	now := time.Now()
	s.mu.Lock()
	m := s.measured
	s.mu.Unlock()
	if !m.fresh(now) {
		return s.measure(now)
	}
	var err error
	if m.has, err = s.has(); err != nil {
		return m, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	m.others = others(used(m.has), s.sums.total.allocated, m.others)
	return m, nil
}

// measure returns a measurement that began after the given time. Of several callers at once, one
// measures, and the others wait.
func (s *Space) measure(after time.Time) (measurement, error) {
	s.measuring.Lock()
	defer s.measuring.Unlock()
	s.mu.Lock()
	m := s.measured
	s.mu.Unlock()
	if m.start.After(after) {
		return m, nil
	}
	m = measurement{start: time.Now()}
	var err error
	if m.has, err = s.has(); err != nil {
		return m, err
	}
	found, err := s.lookAtAll()
	if err != nil {
		return m, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.take(found)
	m.others = others(used(m.has), s.sums.total.allocated, known)
	m.allocated = s.sums.total.allocated + known
	m.images, m.took = len(found), time.Since(m.start)
	s.measured = m
	return m, nil
}

// sight is what was seen of one image's space.
type sight struct {
	name      string
	stat      func(name string) (openat.Status, error)
	key       string // "" for a template or golden
	before    *held  // what was counted before; nil for an image that is no claim and no snapshot
	allocated int64
	gone      bool // deleted meanwhile
}

// noKey is the key of what is promised nothing.
func noKey(string) string { return "" }

// lookAtAll looks at the space of all images.
func (s *Space) lookAtAll() ([]sight, error) {
	var all []sight
	for _, kind := range []struct {
		names func() ([]string, error)
		stat  func(string) (openat.Status, error)
		key   func(string) string
	}{
		{s.pool.Templates, s.pool.StatTemplate, noKey},
		{s.pool.Goldens, s.pool.StatGolden, noKey},
		{s.pool.Commits, s.pool.StatCommit, noKey},
		{s.pool.Snapshots, s.pool.StatSnapshot, image.SnapshotKey},
		{s.pool.Volumes, s.pool.StatVolume, image.VolumeKey},
	} {
		names, err := kind.names()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			all = append(all, sight{name: name, stat: kind.stat, key: kind.key(name)})
		}
	}
	s.mu.Lock()
	for i := range all {
		all[i].before = s.sums.images[all[i].key]
	}
	s.mu.Unlock()
	failed := make([]error, len(all))
	image.Each(len(all), func(i int) {
		st, err := all[i].stat(all[i].name)
		all[i].allocated, all[i].gone = st.Allocated, errors.Is(err, os.ErrNotExist)
		if !all[i].gone {
			failed[i] = err
		}
	})
	return all, errors.Join(failed...)
}

// take enters what claims and snapshots have allocated, if they have not changed meanwhile. It
// returns what inline volumes, templates and goldens have allocated, in bytes. s.mu is locked.
func (s *Space) take(found []sight) (known int64) {
	for _, f := range found {
		now := s.sums.images[f.key]
		switch {
		case f.gone:
		case now == nil && f.before == nil:
			known += f.allocated
		case now == nil || now != f.before || now.allocated == f.allocated:
		default:
			h := *now
			if h.allocated = f.allocated; isSnapshot(f.key) {
				h = ofSnapshot(f.allocated)
			}
			s.sums.set(f.key, h)
		}
	}
	return known
}
