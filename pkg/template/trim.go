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

// touchEvery is how often the use of a template is noted on disk, for other processes. That is
// enough, since a template that goes has not been used for days, and a hit should not write.
const touchEvery = time.Hour

// entry is what a budget needs to know of a template.
type entry struct {
	key    string
	bytes  int64 // space that it takes in the pool
	used   time.Time
	retain bool // as long as the others are enough to meet the budget: see Retain
	keep   bool // even if the budget is exceeded
}

// removal is a template that is to go.
type removal struct {
	entry
	reason string
}

// excess chooses the templates to remove so that the others take no more than budget bytes: the
// least recently used ones, those that are retained after all others, and none that is to be kept.
func excess(entries []entry, budget int64) (remove []removal) {
	var sum int64
	for _, e := range entries {
		sum += e.bytes
	}
	oldest := slices.SortedFunc(slices.Values(entries), func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), a.used.Compare(b.used), cmp.Compare(a.key, b.key))
	})
	for _, e := range oldest {
		if sum <= budget {
			break
		}
		if e.keep {
			continue
		}
		reason := fmt.Sprintf("templates take %s, more than the %s of --template-cache, and this one is the least recently used%s, at %s",
			size.Format(sum), size.Format(budget), e.among(), e.used.UTC().Format(time.DateTime))
		remove = append(remove, removal{e, reason})
		sum -= e.bytes
	}
	return remove
}

// rank orders templates before their last use does.
func (e entry) rank() int {
	if e.retain {
		return 1
	}
	return 0
}

// among says which templates a removed one is the oldest of.
func (e entry) among() string {
	if e.retain {
		return " of those that --prewarm and --prewarm-file list"
	}
	return ""
}

// trimAfter meets the budget after a build. A failure is logged and does not fail the build.
func (s *Store) trimAfter(built string) {
	budget, err := s.budget()
	if err == nil {
		_, err = s.trim(budget, built)
	}
	if err != nil {
		klog.ErrorS(err, "Trimming the templates failed")
	}
}

// budget is how many bytes of the pool templates may take.
func (s *Store) budget() (int64, error) {
	if s.cfg.Budget == nil {
		return math.MaxInt64, nil
	}
	return s.cfg.Budget()
}

// trim removes the least recently used templates until all of them take no more than budget
// bytes, and returns how many it removed. It keeps the one that was just built, and those that
// somebody builds, waits for or clones from at the moment. Clones keep the extents that they
// share.
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
			// The template may have been used since it was chosen.
			gone, err := s.remove(r.key, func() bool { return !s.held(r.key) && s.lastUse(r.key).Equal(r.used) })
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			if !gone { // another one must go in its place
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

// entries lists the templates of the pool, with their size and last use.
func (s *Store) entries(keep map[string]bool) ([]entry, error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return nil, err
	}
	retain := s.retainedKeys()
	var all []entry
	for _, key := range keys {
		fi, err := os.Lstat(s.cfg.Pool.Template(key))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if !keyPattern.MatchString(key) || !fi.Mode().IsRegular() {
			continue // not a template
		}
		all = append(all, entry{
			key: key, bytes: fi.Sys().(*syscall.Stat_t).Blocks * 512, used: s.lastUse(key),
			retain: retain[key], keep: keep[key] || s.held(key),
		})
	}
	return all, nil
}

// lastUse returns when a template was last built or used, to within touchEvery. It is the zero
// time if that is unknown.
func (s *Store) lastUse(key string) time.Time {
	at, err := s.cfg.Pool.Touched(key)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Reading a template's last use failed", "template", key)
	}
	return at
}

// Touch notes that a template is used. A failure is only logged: a template of a full or
// read-only pool can still be used.
func (s *Store) Touch(key string) {
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
		klog.ErrorS(err, "Noting a template's use failed", "template", key)
	}
}

// hold keeps this process from trimming a template until letGo is called. It does not stop
// other processes. That does no harm: an open template stays whole.
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

// forgetGone drops what is remembered of templates that are no longer in the pool.
func (s *Store) forgetGone() {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return // the next trim will do it
	}
	gone := func(key string) bool { _, there := slices.BinarySearch(keys, key); return !there }
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.touched, func(key string, _ time.Time) bool { return gone(key) })
	maps.DeleteFunc(s.verified, func(_ identity, r Record) bool { return gone(r.Key) })
}
