// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package warm

import (
	"context"
	"errors"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
)

const (
	// reviewEvery is the time between two looks at levels and at the room on the node.
	reviewEvery = 10 * time.Second
	// lowerEvery is how long a level must have been too high before it falls.
	lowerEvery = 10 * time.Minute
	// forgotten is how long a kind is kept that nobody asks for: over a night without work.
	forgotten = 24 * time.Hour
	// patience is how long the next volume waits for a quiet moment.
	patience = time.Second
	// quietPoll is the time between two looks for one.
	quietPoll = 2 * time.Millisecond
	// retryAfter is how long a kind is left alone after one of it could not be made.
	retryAfter = 10 * time.Second
)

// keep makes what is missing, and gives back what is too much, until ctx ends.
func (s *Stock) keep(ctx context.Context) {
	defer close(s.done)
	s.recall()
	tick := time.NewTicker(reviewEvery)
	defer tick.Stop()
	lower := time.Now().Add(lowerEvery)
	for {
		discard(s.surplus())
		for s.makeOne(ctx) {
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case now := <-tick.C:
			if now.After(lower) {
				s.lower(now)
				s.note()
				lower = now.Add(lowerEvery)
			}
			if s.cfg.Room() != nil {
				s.Drain()
			}
		}
	}
}

// nudge wakes the keeper.
func (s *Stock) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// makeOne makes one volume of the kind that lacks most, and reports whether there may be more to
// make.
func (s *Stock) makeOne(ctx context.Context) bool {
	k, spec, ok := s.missing(time.Now())
	if !ok || !s.quiet(ctx) || s.cfg.Room() != nil {
		return false
	}
	v, err := s.cfg.Make(ctx, k, spec)
	if err != nil {
		s.failed(ctx, k, err)
		return ctx.Err() == nil
	}
	s.repeats.Succeeded(k.Template)
	if !s.put(k, v) {
		discard([]*Volume{v})
	}
	return true
}

// missing picks the kind of which the smallest part of its level is ready.
func (s *Stock) missing(now time.Time) (k Kind, spec diskfs.Spec, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Before(s.pause) {
		return k, spec, false
	}
	least := 1.0
	for kind, sh := range s.shelves {
		if sh.level == 0 || now.Before(sh.retry) {
			continue
		}
		if part := float64(len(sh.ready)) / float64(sh.level); part < least {
			k, spec, ok, least = kind, sh.spec, true, part
		}
	}
	return k, spec, ok
}

// quiet waits until nobody waits for the node, for a while. It returns false if ctx ends.
func (s *Stock) quiet(ctx context.Context) bool {
	for end := time.Now().Add(patience); !s.cfg.Quiet() && time.Now().Before(end); time.Sleep(quietPoll) {
		if ctx.Err() != nil {
			return false
		}
	}
	return ctx.Err() == nil
}

func (s *Stock) put(k Kind, v *Volume) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.shelves[k]
	if sh == nil || len(sh.ready) >= sh.level || time.Now().Before(s.pause) {
		return false
	}
	sh.ready = append(sh.ready, v)
	return true
}

// failed leaves a kind alone for a while.
func (s *Stock) failed(ctx context.Context, k Kind, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	if sh := s.shelves[k]; sh != nil {
		sh.retry = time.Now().Add(retryAfter)
	}
	s.mu.Unlock()
	if errors.Is(err, os.ErrNotExist) { // the template is gone, or is built anew after an upgrade
		return
	}
	if show, left := s.repeats.Failed(k.Template, "ready"); show {
		logs.Warn("A volume could not be made ready; pods wait for theirs to be made", "err", err, "template", k.Template, "form", k.Form, "notLogged", left)
	}
}

// surplus takes out what is above its level, and forgets kinds whose level is 0.
func (s *Stock) surplus() (all []*Volume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, sh := range s.shelves {
		if n := len(sh.ready) - sh.level; n > 0 {
			all = append(all, sh.ready[:n]...)
			sh.ready = sh.ready[n:]
		}
		if sh.level == 0 {
			delete(s.shelves, k)
		}
	}
	return all
}

// lower lowers the levels of which half was never needed since the last time, and has kinds be
// forgotten that nobody asks for.
func (s *Stock) lower(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sh := range s.shelves {
		if sh.least >= (sh.level+1)/2 {
			sh.level = max(s.cfg.Level, sh.level/2)
		}
		if now.Sub(sh.used) > forgotten {
			sh.level = 0
		}
		sh.least = len(sh.ready)
	}
}

// recall takes up what was worth keeping when an earlier process ended.
func (s *Stock) recall() {
	if s.cfg.Recall == nil {
		return
	}
	wants := s.cfg.Recall()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range wants {
		s.want(w.Kind, w.Spec, w.Level)
	}
	if len(wants) > 0 {
		klog.InfoS("Keeping volumes ready as before", "kinds", len(wants))
	}
}

func (s *Stock) note() {
	if s.cfg.Note == nil {
		return
	}
	s.mu.Lock()
	var wants []Want
	for k, sh := range s.shelves {
		if sh.level > 0 {
			wants = append(wants, Want{Kind: k, Spec: sh.spec, Level: sh.level})
		}
	}
	s.mu.Unlock()
	s.cfg.Note(wants)
}
