// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
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
)

// What a volume is promised of the pool, from most to least:
//
//   - thick claims have their space;
//   - thin claims are promised theirs: the pool takes on no more of them than it
//     could fill, Overcommit times over. With an overcommit of 1 every claim could
//     be written from end to end, with all snapshots kept;
//   - inline volumes are promised nothing, and take what is free. They end with
//     their pods, and are what makes room.
//
// Headroom is left free by all of them when they are made. It is for what those
// that are there already write, and for the pool's own metadata.

// space is what a Manager knows of the pool's space that the pool does not say.
type space struct {
	headroom   size.Share
	overcommit float64

	mu      sync.Mutex
	pending map[*demand]bool      // of what is being made
	claims  map[string]remembered // replaced as a whole, and never written to
}

// demand is what something new will want of the pool, in bytes.
type demand struct {
	key  string // of the image that is being made; "" if it exists already, and grows
	thin int64  // promised
	firm int64  // may take all of that, whatever else there is
	now  int64  // takes that at once
}

// claimDemand is that of a claim of so many bytes, or of one that grows by them.
func claimDemand(key string, bytes int64, thick bool) demand {
	if thick {
		return demand{key: key, firm: bytes, now: bytes}
	}
	return demand{key: key, thin: bytes}
}

// Keys of images, in budgets and among the pending.
func volumeKey(id string) string   { return "volumes/" + id }
func snapshotKey(id string) string { return "snapshots/" + id }

// budget is what the pool has, and what it has promised, in bytes.
type budget struct {
	total, available, headroom int64
	thin                       int64 // claims, by size
	firm                       int64 // thick claims by size, snapshots by what they may come to take
	others                     int64 // all the rest, by what it takes now
	overcommit                 float64
}

// left is what can still be promised firmly.
func (b budget) left() int64 {
	unpromised := b.total - b.headroom - b.others - b.firm - int64(float64(b.thin)/b.overcommit)
	return max(0, min(b.free(), unpromised))
}

// free is what can be taken at once.
func (b budget) free() int64 { return max(0, b.available-b.headroom) }

// refuse says why a demand is too much, or nil.
func (b budget) refuse(d demand) error {
	if float64(d.firm)+float64(d.thin)/b.overcommit > float64(b.left()) {
		left := b.left()
		if d.thin > 0 {
			left = int64(float64(left) * b.overcommit)
		}
		return fmt.Errorf("%w: %s asked for, %s can be promised: %s; delete claims or snapshots, run `csi-disktemplate clean-all` to drop cached templates, enlarge the pool, or raise --overcommit",
			pool.ErrFull, size.Format(d.firm+d.thin), size.Format(left), b)
	}
	if d.now > b.free() {
		return fmt.Errorf("%w: %s needed at once: %s; delete volumes, run `csi-disktemplate clean-all` to drop cached templates, or enlarge the pool",
			pool.ErrFull, size.Format(d.now), b)
	}
	return nil
}

func (b budget) String() string {
	return fmt.Sprintf("of %s, %s are free, %s of it headroom; promised are %s to thin claims (--overcommit %g) and %s to thick claims and snapshots; %s are taken by inline volumes, templates and whatever else",
		size.Format(b.total), size.Format(b.available), size.Format(b.headroom), size.Format(b.thin), b.overcommit, size.Format(b.firm), size.Format(b.others))
}

// admit holds a demand against the budget, and keeps it in mind until release is
// called: what is being made at the same time must not be promised twice. The
// error is [pool.ErrFull], with the figures.
//
// Two demands of which either alone would fit may both be refused.
func (m *Manager) admit(d demand) (release func(), err error) {
	m.space.mu.Lock()
	if m.space.pending == nil {
		m.space.pending = map[*demand]bool{}
	}
	pending := slices.Collect(maps.Keys(m.space.pending))
	m.space.pending[&d] = true
	m.space.mu.Unlock()
	release = func() {
		m.space.mu.Lock()
		defer m.space.mu.Unlock()
		delete(m.space.pending, &d)
	}
	err = m.twice(func() error {
		b, err := m.survey(pending)
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

// notMaking is [ErrUnderWay] while the image of a key is being made, though it has
// no name yet.
func (s *space) notMaking(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d := range s.pending {
		if d.key == key {
			return fmt.Errorf("%w: %s is being made, and can be deleted when that is done; try again", ErrUnderWay, key)
		}
	}
	return nil
}

// twice asks again, before it says that the pool is full, when what was deleted a
// moment ago is free: on btrfs that takes a commit.
func (m *Manager) twice(ask func() error) error {
	err := ask()
	if !errors.Is(err, pool.ErrFull) {
		return err
	}
	if err := m.pool.Sync(); err != nil {
		return err
	}
	return ask()
}

// admitInline refuses an inline volume when no more than the headroom is free.
func (m *Manager) admitInline() error { return m.twice(m.roomLeft) }

// roomLeft is [pool.ErrFull] when no more than the headroom is free.
func (m *Manager) roomLeft() error {
	s, err := m.pool.Space()
	if err != nil {
		return err
	}
	if headroom := m.space.headroom.Of(s.Total); s.Available < headroom {
		return fmt.Errorf("%w: of %s, %s are free, and new volumes leave %s of headroom; delete volumes, run `csi-disktemplate clean-all` to drop cached templates, or enlarge it",
			pool.ErrFull, size.Format(s.Total), size.Format(s.Available), size.Format(headroom))
	}
	return nil
}

// Available is how large a further claim could be, in bytes, a whole number of
// MiB; thick if it is to have its space at once.
func (m *Manager) Available(thick bool) (int64, error) {
	m.space.mu.Lock()
	pending := slices.Collect(maps.Keys(m.space.pending))
	m.space.mu.Unlock()
	b, err := m.survey(pending)
	if err != nil {
		return 0, err
	}
	left := b.left()
	if !thick {
		left = int64(float64(left) * b.overcommit)
	}
	return left / diskfs.MiB * diskfs.MiB, nil
}

// survey adds up what there is, with pending for what is being made.
func (m *Manager) survey(pending []*demand) (budget, error) {
	if err := m.pool.Check(); err != nil { // what is counted is found by its path
		return budget{}, err
	}
	s, err := m.pool.Space()
	if err != nil {
		return budget{}, err
	}
	b := budget{total: s.Total, available: s.Available, headroom: m.space.headroom.Of(s.Total), overcommit: m.space.overcommit}
	counted := map[string]bool{}
	for _, d := range pending {
		b.thin += d.thin
		b.firm += d.firm
		counted[d.key] = true
	}
	ours := int64(0)
	claims := m.space.startClaims()
	for _, kind := range []struct {
		names func() ([]string, error)
		path  func(string) string
		key   func(string) string
		add   func(name string, st *syscall.Stat_t)
	}{
		{m.pool.Templates, m.pool.Template, func(key string) string { return "templates/" + key },
			func(_ string, st *syscall.Stat_t) { b.others += st.Blocks * 512 }},
		{m.pool.Snapshots, m.pool.Snapshot, snapshotKey,
			func(_ string, st *syscall.Stat_t) { b.firm += st.Blocks * 512 }},
		{m.pool.Volumes, m.pool.Volume, volumeKey,
			func(id string, st *syscall.Stat_t) { b.addVolume(st, claims.of(id, st, m.Get)) }},
	} {
		names, err := kind.names()
		if err != nil {
			return budget{}, err
		}
		for _, name := range names {
			var st syscall.Stat_t
			if err := syscall.Lstat(kind.path(name), &st); err == syscall.ENOENT {
				continue // gone meanwhile
			} else if err != nil {
				return budget{}, &os.PathError{Op: "lstat", Path: kind.path(name), Err: err}
			}
			ours += st.Blocks * 512
			if !counted[kind.key(name)] {
				kind.add(name, &st)
			}
		}
	}
	m.space.endClaims(claims)
	// On a pool that shares its filesystem with others. What images share is in
	// ours several times, so that this is the least it can be.
	b.others += max(0, s.Total-s.Available-ours)
	return b, nil
}

// addVolume counts a claim by what it is promised, and an inline volume by what it
// takes.
func (b *budget) addVolume(st *syscall.Stat_t, c promise) {
	switch {
	case !c.claim:
		b.others += st.Blocks * 512
	case c.thick:
		b.firm += c.size
	default:
		b.thin += c.size
	}
}

// promise is what a budget wants to know of a volume's record.
type promise struct {
	claim bool // and no inline volume, nor anything else
	thick bool
	size  int64
}

// promises remembers what the records said: to read one takes 13 µs, to see that it
// has not changed 2. The status change time tells, which every change of an
// attribute moves.
type promises struct {
	before, now map[string]remembered
}

type remembered struct {
	ino   uint64
	ctime syscall.Timespec
	promise
}

func (p promises) of(id string, st *syscall.Stat_t, read func(id string) (Record, error)) promise {
	r, ok := p.before[id]
	if !ok || r.ino != st.Ino || r.ctime != st.Ctim {
		r = remembered{ino: st.Ino, ctime: st.Ctim}
		record, err := read(id)
		switch {
		case err == nil:
			r.promise = promise{claim: true, thick: record.Thick, size: record.Spec.Size}
		case !errors.Is(err, ErrNotFound):
			klog.ErrorS(err, "Counting a volume by what it takes", "volume", id)
		}
	}
	// A change in the same tick of the kernel's clock would go unseen.
	if time.Since(time.Unix(st.Ctim.Unix())) > clockTick {
		p.now[id] = r
	}
	return r.promise
}

// clockTick is more than the kernel's coarse clock, which stamps files, ever lags:
// 10 ms with CONFIG_HZ=100.
const clockTick = 50 * time.Millisecond

func (s *space) startClaims() promises {
	s.mu.Lock()
	defer s.mu.Unlock()
	return promises{before: s.claims, now: make(map[string]remembered, len(s.claims))}
}

// endClaims keeps what was seen, and forgets what is no more.
func (s *space) endClaims(p promises) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.claims = p.now
}
