// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package space counts what the pool has promised, and what it can still promise.
//
// The promises, from most to least:
//
//   - Thick claims have their space.
//   - Thin claims are promised theirs. The pool promises them no more than Overcommit times
//     its own size. With an overcommit of 1 every claim could be written from end to end,
//     with all snapshots kept.
//   - Inline volumes are promised nothing, and take what is free. They end with their pods,
//     and that makes room.
//
// All of them leave the headroom free when they are made. It is for the writes of volumes
// that exist already, and for the pool's own metadata.
//
// What the pool has is the least of what its layers have: see [pool.Space]. Whoever fills a
// filesystem below the pool takes space of it, except of thick claims.
//
// There is no ledger: the sum is taken from the images each time it is asked for. Only
// demands of volumes that are being made are kept in memory, so that two requests are not
// promised the same space. Both may be refused where either alone would fit.
//
// Source: statfs(2), and st_blocks in stat(2), which counts shared extents once per file.
package space

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Config is what a pool may promise.
type Config struct {
	// Headroom is the space of the pool that new volumes leave free; the zero value is none.
	Headroom size.Share
	// Overcommit is how many times its own size the pool promises to thin claims; 0 is 1.
	Overcommit float64
	// Ended, if not nil, returns when the volumes that were deleted up to now have given their
	// space back, or after a while.
	Ended func()
}

// Space is the space of a pool.
type Space struct {
	pool   *pool.Pool
	images *image.Store
	cfg    Config

	mu       sync.Mutex
	pending  map[*Demand]bool      // demands of volumes and snapshots that are being made
	promises map[string]remembered // by volume id; replaced as a whole, never changed

	freeing   sync.Mutex
	freeAgain time.Time // when the pool may be synced and trimmed again, for want of space
	freedOf   int64     // how many images had been removed at the last time
}

// New returns the Space of a pool.
func New(p *pool.Pool, images *image.Store, c Config) *Space {
	c.Overcommit = cmp.Or(c.Overcommit, 1)
	return &Space{pool: p, images: images, cfg: c, pending: map[*Demand]bool{}}
}

// Admit returns [pool.ErrFull], with the figures, if the pool cannot promise a demand, and
// [pool.ErrCannotReserve] if it cannot reserve what is to be reserved.
// Otherwise it counts the demand until release is called: a volume that is being made has no
// image yet that could be counted.
func (s *Space) Admit(d Demand) (release func(), err error) {
	if d.reserved {
		if err := s.pool.CanReserve(); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	others := slices.Collect(maps.Keys(s.pending))
	s.pending[&d] = true
	s.mu.Unlock()
	release = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.pending, &d)
	}
	err = s.retryFreed(func() error {
		b, err := s.survey(others)
		if err != nil {
			return err
		}
		return b.refuse(d)
	})
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// AdmitInline returns [pool.ErrFull] if no more than the headroom is free.
func (s *Space) AdmitInline() error { return s.retryFreed(s.Check) }

// Check returns [pool.ErrFull] if no more than the headroom is free at this moment.
func (s *Space) Check() error {
	has, err := s.pool.Space()
	if err != nil {
		return err
	}
	if headroom := s.headroom(has); has.Available <= headroom {
		limit := has.Limit
		if limit != "" {
			limit = "; " + limit
		}
		return fmt.Errorf("%w: of %s, %s are free, and new volumes leave %s of headroom%s; delete volumes, %s, or %s",
			pool.ErrFull, size.Format(has.Total), size.Format(has.Available), size.Format(headroom), limit, pool.DropTemplates(), enlarge(has.Limit))
	}
	return nil
}

// headroom is what new volumes leave free of the pool's own filesystem, in bytes.
func (s *Space) headroom(has pool.Space) int64 {
	return max(s.cfg.Headroom.Of(has.Total), has.Headroom)
}

// retryFreed asks again, before it reports a full pool, after it has made sure that deleted
// space is free: btrfs frees it only at a commit, and a layer below has it only after that.
func (s *Space) retryFreed(ask func() error) error {
	err := ask()
	if !errors.Is(err, pool.ErrFull) {
		return err
	}
	s.free()
	return ask()
}

// freePause is how many times as long as a sync of the pool took the pool is left alone after
// it, although callers wait for space: each sync makes all pods wait for their writes.
const freePause = 4

// free makes sure that deleted space is free. Of several callers at once, one does it, and the
// others wait. It does nothing if that was done a moment ago and no image was removed since. On
// a full disk below the pool either step may fail; then there is no space, which the next
// question finds.
func (s *Space) free() {
	s.freeing.Lock()
	defer s.freeing.Unlock()
	removed := s.images.Removed()
	if removed == s.freedOf && time.Now().Before(s.freeAgain) {
		return
	}
	s.freedOf = removed
	if s.cfg.Ended != nil {
		s.cfg.Ended()
	}
	start := time.Now()
	err := s.pool.Sync()
	if unused, e := s.pool.Unused(); e == nil && unused > 0 {
		if e := s.pool.Trim(); e != nil && !errors.Is(e, errors.ErrUnsupported) {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		klog.V(2).InfoS("Freeing deleted space failed", "err", err)
	}
	end := time.Now()
	s.freeAgain = end.Add(freePause * end.Sub(start))
}

// CheckNotMaking returns [errdefs.ErrUnderWay] while the image with this key is being made.
// Such an image has no name yet, so it cannot be found in the pool.
func (s *Space) CheckNotMaking(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range s.pending {
		if d.Key == key {
			return fmt.Errorf("%w: %s is being made, and can be deleted after that; try again", errdefs.ErrUnderWay, key)
		}
	}
	return nil
}

// Available is the size of the largest claim that can still be made, in bytes, a whole
// number of MiB.
func (s *Space) Available(p image.Provisioning) (int64, error) {
	if p.Reserves() && s.pool.CanReserve() != nil {
		return 0, nil
	}
	s.mu.Lock()
	pending := slices.Collect(maps.Keys(s.pending))
	s.mu.Unlock()
	b, err := s.survey(pending)
	if err != nil {
		return 0, err
	}
	return b.largest(p) / diskfs.MiB * diskfs.MiB, nil
}

// survey adds up all images of the pool, and the demands of those that are being made.
func (s *Space) survey(pending []*Demand) (budget, error) {
	if err := s.pool.Check(); err != nil { // images are found by their paths
		return budget{}, err
	}
	has, err := s.pool.Space()
	if err != nil {
		return budget{}, err
	}
	b := budget{total: has.Total, available: has.Available, headroom: s.headroom(has), overcommit: s.cfg.Overcommit, limit: has.Limit}
	counted := map[string]bool{}
	for _, d := range pending {
		b.thin += d.Thin
		b.firm += d.Firm
		counted[d.Key] = true
	}
	ours := int64(0)
	claims := s.recall()
	for _, kind := range []struct {
		names func() ([]string, error)
		path  func(string) string
		key   func(string) string
		add   func(name string, st *syscall.Stat_t)
	}{
		{s.pool.Templates, s.pool.Template, func(key string) string { return "templates/" + key },
			func(_ string, st *syscall.Stat_t) { b.others += st.Blocks * 512 }},
		{s.pool.Snapshots, s.pool.Snapshot, image.SnapshotKey,
			func(_ string, st *syscall.Stat_t) { b.firm += st.Blocks * 512 }},
		{s.pool.Volumes, s.pool.Volume, image.VolumeKey,
			func(id string, st *syscall.Stat_t) { b.add(st, claims.of(id, st, s.images.GetClaim)) }},
	} {
		names, err := kind.names()
		if err != nil {
			return budget{}, err
		}
		for _, name := range names {
			fi, err := os.Lstat(kind.path(name))
			if errors.Is(err, os.ErrNotExist) {
				continue // gone meanwhile
			}
			if err != nil {
				return budget{}, err
			}
			st := fi.Sys().(*syscall.Stat_t)
			ours += st.Blocks * 512
			if !counted[kind.key(name)] {
				kind.add(name, st)
			}
		}
	}
	s.remember(claims)
	// The pool may share its filesystem with others. `ours` counts shared extents several
	// times, so this is a lower bound of what they take.
	b.others += max(0, has.Total-has.Available-ours)
	return b, nil
}

// add counts a claim by its promise, and an inline volume by what it takes.
func (b *budget) add(st *syscall.Stat_t, p promise) {
	if !p.claim {
		b.others += st.Blocks * 512
		return
	}
	thin, firm, _ := p.provisioning.Promise(p.bytes)
	b.thin += thin
	b.firm += firm
}
