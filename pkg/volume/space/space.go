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
// # Sums
//
// What was promised is added up as it changes, so that a request costs the same beside any
// number of images. The images stay the truth. They are read when the plugin starts. Whenever
// the Store changes one, that one is read again. Each sweep reads all of them, and what was
// counted wrongly is logged, and right from then on. Demands of volumes that are being made are
// in the sums too. Whether a demand fits is decided while the sums are locked, so that no two
// requests are promised the same space.
//
// What claims have taken of their promises cannot be added up: pods write without a word. So a
// demand is first checked as if claims had taken nothing, and all that is taken of the pool
// were others'. Only if it does not fit that way, all images are looked at. What is found is
// kept for a while, and looked at anew before anything is refused.
//
// Source: statfs(2), and st_blocks in stat(2), which counts shared extents once per file.
package space

import (
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
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
	// Spare, if not nil, is called before a demand is refused. It gives back what the pool can do
	// without, and waits a while for what deleted volumes still take.
	Spare func()
}

// Space is the space of a pool.
type Space struct {
	pool   *pool.Pool
	images *image.Store
	cfg    Config

	mu       sync.Mutex
	sums     sums
	changes  map[string]int // how many operations are changing an image at the moment, by key
	measured measurement    // the latest one

	measuring sync.Mutex
	turns     [16]sync.Mutex // one for the images of each key's hash; see [Space.look]
	seed      maphash.Seed

	freeing   sync.Mutex
	freeAgain time.Time // when the pool may be synced and trimmed again, for want of space
	freedOf   int64     // how many images had been removed at the last time
}

// New adds up what the images of a pool were promised, and returns its Space. From here on the
// Store tells it of changes.
func New(p *pool.Pool, images *image.Store, c Config) (*Space, error) {
	c.Overcommit = cmp.Or(c.Overcommit, 1)
	s := &Space{pool: p, images: images, cfg: c, sums: newSums(), changes: map[string]int{}, seed: maphash.MakeSeed()}
	if _, err := s.recount(); err != nil {
		return nil, err
	}
	images.Watch(s.changing)
	return s, nil
}

// Admit returns [pool.ErrFull], with the figures, if the pool cannot promise a demand, and
// [pool.ErrCannotReserve] if it cannot reserve what is to be reserved.
// Otherwise it counts the demand until release is called, or until its image has its name and
// counts itself.
func (s *Space) Admit(d Demand) (release func(), err error) {
	if d.reserved {
		if err := s.pool.CanReserve(); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	s.sums.begin(&d)
	s.mu.Unlock()
	release = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sums.end(&d)
	}
	if err := s.retryFreed(func() error { return s.promise(&d) }); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// promise counts a demand if it fits. It looks at all images only if that can make a difference.
func (s *Space) promise(d *Demand) error {
	asked := time.Now()
	has, err := s.has()
	if err != nil {
		return err
	}
	if s.count(d, has, used(has)) == nil {
		return nil
	}
	m, err := s.kept()
	if err != nil {
		return err
	}
	if err := s.count(d, m.has, m.others); err == nil || m.start.After(asked) {
		return err
	}
	if m, err = s.measure(asked); err != nil {
		return err
	}
	return s.count(d, m.has, m.others)
}

// count counts a demand, unless it is too large.
func (s *Space) count(d *Demand, has pool.Space, others int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.budget(has, others).refuse(*d); err != nil {
		return err
	}
	s.sums.count(d)
	return nil
}

// budget is what the pool has and has promised. s.mu is locked.
func (s *Space) budget(has pool.Space, others int64) budget {
	return budget{
		total: has.Total, available: has.Available, headroom: s.headroom(has), overcommit: s.cfg.Overcommit, limit: has.Limit,
		thin: s.sums.total.thin, firm: s.sums.total.firm, others: others,
	}
}

// AdmitInline returns [pool.ErrFull] if no more than the headroom is free.
func (s *Space) AdmitInline() error { return s.retryFreed(s.Check) }

// Check returns [pool.ErrFull] if no more than the headroom is free at this moment.
func (s *Space) Check() error {
	has, err := s.pool.Space()
	if err != nil {
		return err
	}
	return s.checkFree(has, 0)
}

// CheckSpare is [Space.Check] for what the pool need not have: it leaves one part in so many of
// the pool free beside the headroom.
func (s *Space) CheckSpare(part int64) error {
	has, err := s.pool.Space()
	if err != nil {
		return err
	}
	return s.checkFree(has, has.Total/part)
}

func (s *Space) checkFree(has pool.Space, spare int64) error {
	if headroom := s.headroom(has) + spare; has.Available <= headroom {
		limit := has.Limit
		if limit != "" {
			limit = "; " + limit
		}
		err := fmt.Errorf("%w: of %s, %s are free, and new volumes leave %s of headroom%s",
			pool.ErrFull, size.Format(has.Total), size.Format(has.Available), size.Format(headroom), limit)
		return health.Advise(err, fmt.Sprintf("delete volumes, or have the operator %s, or %s", enlarge(has.Limit), pool.DropTemplates()))
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
	if !s.free() {
		return ask()
	}
	for end := time.Now().Add(inactivation); ; time.Sleep(inactivation / 10) {
		if err = ask(); !errors.Is(err, pool.ErrFull) || time.Now().After(end) {
			return err
		}
	}
}

// inactivation is how long xfs may take to free the blocks of a file whose last descriptor is closed:
// it does that in the background (xfs_inodegc_queue in fs/xfs/xfs_icache.c), and a sync does not wait.
const inactivation = 100 * time.Millisecond

// freePause is how many times as long as a sync of the pool took the pool is left alone after
// it, although callers wait for space: each sync makes all pods wait for their writes.
const freePause = 4

// free makes sure that deleted space is free. Of several callers at once, one does it, and the
// others wait. It does nothing if that was done a moment ago and no image was removed since. On
// a full disk below the pool either step may fail; then there is no space, which the next
// question finds. It reports whether images were removed since the last time.
func (s *Space) free() (deleted bool) {
	s.freeing.Lock()
	defer s.freeing.Unlock()
	removed := s.images.Removed()
	if removed == s.freedOf && time.Now().Before(s.freeAgain) {
		return false
	}
	deleted = removed != s.freedOf
	s.freedOf = removed
	if s.cfg.Spare != nil {
		s.cfg.Spare()
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
	return deleted
}

// CheckNotMaking returns [errdefs.ErrUnderWay] while the image with this key is being made.
// Such an image has no name yet, so it cannot be found in the pool.
func (s *Space) CheckNotMaking(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sums.makes(key) != nil {
		return fmt.Errorf("%w: %s is being made, and can be deleted after that; try again", errdefs.ErrUnderWay, key)
	}
	return nil
}

// Account is what a pool has promised, in bytes.
type Account struct {
	Headroom int64 // that new volumes leave free
	Promised int64 // to claims and snapshots, whatever they have taken of it
	Left     int64 // that can still be promised firmly
}

// Account returns what the pool has promised.
func (s *Space) Account() (Account, error) {
	m, err := s.kept()
	if err != nil {
		return Account{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.budget(m.has, m.others)
	return Account{Headroom: b.headroom, Promised: b.thin + b.firm, Left: b.left()}, nil
}

// Available is the size of the largest claim that can still be made, in bytes, a whole
// number of MiB.
func (s *Space) Available(p image.Provisioning) (int64, error) {
	if p.Reserves() && s.pool.CanReserve() != nil {
		return 0, nil
	}
	m, err := s.kept()
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.budget(m.has, m.others).largest(p) / diskfs.MiB * diskfs.MiB, nil
}
