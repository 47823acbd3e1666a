// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// touchEvery is how often the use of a template is noted where other processes find
// it. What a budget throws out has not been used for days, and a hit should not write.
const touchEvery = time.Hour

// entry is a template as a budget sees it.
type entry struct {
	key   string
	bytes int64 // that it takes of the pool
	used  time.Time
	keep  bool // whatever it takes
}

// removal is a template that is to go.
type removal struct {
	entry
	reason string
}

// excess chooses the templates that are to go, so that all of them take no more than
// budget bytes: those that were not used for longest, and none that is to be kept.
func excess(entries []entry, budget int64) (remove []removal) {
	var sum int64
	for _, e := range entries {
		sum += e.bytes
	}
	oldest := slices.SortedFunc(slices.Values(entries), func(a, b entry) int {
		return cmp.Or(a.used.Compare(b.used), cmp.Compare(a.key, b.key))
	})
	for _, e := range oldest {
		if sum <= budget {
			break
		}
		if e.keep {
			continue
		}
		remove = append(remove, removal{e, fmt.Sprintf("templates take %s of the %s that they may (--template-cache), and this one was last used at %s",
			size.Format(sum), size.Format(budget), e.used.UTC().Format(time.DateTime))})
		sum -= e.bytes
	}
	return remove
}

// Budget is how many bytes of the pool templates may take.
func (s *Store) Budget() (int64, error) {
	if s.cfg.Budget == nil {
		return math.MaxInt64, nil
	}
	return s.cfg.Budget()
}

// Trim removes the templates that were not used for longest, until all of them take
// no more than budget bytes, and returns how many it removed. Those that somebody
// builds, waits for or clones from at the moment stay. Clones keep what they share.
func (s *Store) Trim(budget int64) (removed int, err error) { return s.trim(budget, "") }

// trimAfter trims after a build, to which it is of no importance.
func (s *Store) trimAfter(built string) {
	budget, err := s.Budget()
	if err == nil {
		_, err = s.trim(budget, built)
	}
	if err != nil {
		klog.ErrorS(err, "Trimming the templates")
	}
}

func (s *Store) trim(budget int64, built string) (removed int, err error) {
	s.trimming.Lock()
	defer s.trimming.Unlock()
	left := map[string]bool{built: true}
	var errs []error
	for again := true; again; {
		entries, err := s.entries(left)
		if err != nil {
			return removed, errors.Join(append(errs, err)...)
		}
		again = false
		for _, r := range excess(entries, budget) {
			// A lot may have happened since it was chosen.
			gone, err := s.remove(r.key, func() bool { return !s.held(r.key) && s.lastUse(r.key).Equal(r.used) })
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			if !gone { // choose others in its place
				left[r.key], again = true, true
				continue
			}
			klog.InfoS("Removed a template", "template", r.key, "bytes", r.bytes, "reason", r.reason)
			removed++
			if s.cfg.Trimmed != nil {
				s.cfg.Trimmed(r.key, r.bytes)
			}
		}
	}
	s.forgetGone()
	return removed, errors.Join(errs...)
}

// entries weighs the templates there are.
func (s *Store) entries(keep map[string]bool) ([]entry, error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return nil, err
	}
	var all []entry
	for _, key := range keys {
		fi, err := os.Lstat(s.cfg.Pool.Template(key))
		if errors.Is(err, os.ErrNotExist) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		if !keyPattern.MatchString(key) || !fi.Mode().IsRegular() {
			continue // nothing of ours
		}
		all = append(all, entry{
			key: key, bytes: fi.Sys().(*syscall.Stat_t).Blocks * 512, used: s.lastUse(key), keep: keep[key] || s.held(key),
		})
	}
	return all, nil
}

// lastUse is when a template was built or, give or take [touchEvery], used last. It is
// the zero time if nobody knows.
func (s *Store) lastUse(key string) time.Time {
	at, err := s.cfg.Pool.Touched(key)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Asking for a template's last use", "template", key)
	}
	return at
}

// touch notes that a template is used. That a pool is full or read-only is no reason
// not to use it.
func (s *Store) touch(key string) {
	now := time.Now()
	s.mu.Lock()
	due := now.Sub(s.touched[key]) >= touchEvery
	if due {
		s.touched[key] = now
	}
	s.mu.Unlock()
	if !due {
		return
	}
	if err := s.cfg.Pool.Touch(key, now); err != nil {
		klog.ErrorS(err, "Noting a template's use", "template", key)
	}
}

// hold keeps a template from being trimmed by this process until it is let go. That is
// no promise to whom clones from it, who needs none: an open template stays whole.
func (s *Store) hold(key string) (letGo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holders[key]++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.holders[key]--; s.holders[key] == 0 {
			delete(s.holders, key)
		}
	})
}

func (s *Store) held(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holders[key] > 0
}

// forgetGone forgets what is known of templates that are no more.
func (s *Store) forgetGone() {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return // next time, then
	}
	gone := func(key string) bool { _, there := slices.BinarySearch(keys, key); return !there }
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.touched, func(key string, _ time.Time) bool { return gone(key) })
	maps.DeleteFunc(s.verified, func(_ identity, r Record) bool { return gone(r.Key) })
}
