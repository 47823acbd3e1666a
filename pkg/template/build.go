// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// purpose is why a template is built. The zero value is a call that waits for it.
type purpose struct {
	ahead bool      // nobody asked for it: it does not count for [Config].BuildsPerHour
	used  time.Time // the last use to note; zero is the time of the build
}

// join waits for the build of key, starting it if none is under way. A build that is under way keeps
// its own purpose.
func (s *Store) join(ctx context.Context, key string, spec diskfs.Spec, why purpose) error {
	done := s.builds.DoChan(key, func() (any, error) {
		ended := s.outcomes.begin(key, spec)
		err := s.build(key, spec, why)
		ended(err)
		s.logFailed(key, err)
		return nil, err
	})
	defer waits(ctx, key, func() string { return s.waitsFor(key, spec) })()
	soon, cancel := patient(ctx)
	defer cancel()
	select {
	case r := <-done:
		return r.Err
	case <-soon.Done():
	}
	err := error(&waiting{s.waitsFor(key, spec)})
	if ctx.Err() != nil {
		return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	return err
}

// logFailed logs a build that failed, since its callers may have given up.
func (s *Store) logFailed(key string, err error) {
	if err == nil {
		s.repeats.Succeeded(key)
		return
	}
	if errors.Is(err, ErrTooMany) {
		return // the callers are told at once
	}
	show, left := s.repeats.Failed(key, "build")
	pairs := []any{"template", key}
	if left > 0 {
		pairs = append(pairs, "notLogged", left)
	}
	switch {
	case !show:
	case s.ctx.Err() != nil:
		klog.InfoS("Stopped building a template, since the plugin stops", pairs...)
	case errors.Is(err, pool.ErrFull), errors.Is(err, ErrNoFormatter), errors.Is(err, ErrNoContent), errors.Is(err, ErrBuilding), errors.Is(err, ErrChanged):
		logs.Warn("Building a template failed", append([]any{"err", err}, pairs...)...)
	default:
		klog.ErrorS(err, "Building a template failed", pairs...)
	}
}

// build makes the template of key, unless another process has made it by the time that this
// one has the key's lock.
func (s *Store) build(key string, spec diskfs.Spec, why purpose) error {
	// The turn comes before the lockfile, so that a refused build leaves nothing behind.
	turn, err := s.turnFor(why)
	if err != nil {
		if t, err := s.Lookup(key); err == nil { // it was built since the caller looked
			return t.Close()
		}
		s.observe(spec, 0, err)
		return err
	}
	defer turn.end()
	limit, cancel := context.WithTimeout(s.ctx, s.cfg.LockTimeout)
	defer cancel()
	defer s.queue.leave(key)
	s.queue.enter(key, locking)
	lock, err := s.cfg.Pool.Lock(limit, key)
	if err != nil {
		return err
	}
	defer lock.Unlock()

	old, err := s.Lookup(key)
	switch {
	case err == nil:
		return old.Close()
	case errors.Is(err, ErrCorrupt):
		klog.ErrorS(err, "Rebuilding a corrupt template", "template", key)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	s.queue.enter(key, queued)
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-limit.Done(): // others must not wait for the lock of a build that only waits
		return &waiting{s.waitsFor(key, spec)}
	}
	s.queue.enter(key, building)
	start := time.Now()
	err = s.create(key, spec, start, turn)
	s.observe(spec, time.Since(start), err)
	if err == nil {
		s.queue.note(time.Since(start))
		s.noteBuilt(key, why)
		s.trimAfter(key)
	}
	return err
}

func (s *Store) observe(spec diskfs.Spec, took time.Duration, err error) {
	if s.cfg.Observe != nil {
		s.cfg.Observe(spec, took, err)
	}
}

// turnFor takes a turn, or makes one that counts for nothing.
func (s *Store) turnFor(why purpose) (*turn, error) {
	if why.ahead {
		return &turn{}, nil
	}
	return s.pace.take()
}

// noteBuilt notes the last use of a template that was just built. One that nobody has used since is
// as old as its purpose says, and its first use is noted at once.
func (s *Store) noteBuilt(key string, why purpose) {
	if why.used.IsZero() {
		s.Touch(key)
		return
	}
	if err := s.cfg.Pool.Touch(key, why.used); err != nil {
		klog.ErrorS(err, "Noting a template's use failed", "template", key)
	}
}

// create makes the template of key as a file without a name: first its content, then its
// record and its name.
func (s *Store) create(key string, spec diskfs.Spec, start time.Time, turn *turn) error {
	f, err := s.cfg.Pool.NewTemplate()
	if err != nil {
		return err
	}
	defer f.Close()
	klog.InfoS("Building a template", "template", key, "spec", spec.String())
	r, err := s.content(f, key, spec, start, turn)
	if err != nil {
		return err
	}
	packed, extents, err := s.packed(f, key)
	if err != nil {
		return err
	}
	defer packed.Close()
	if err := s.publish(packed, r); err != nil { // which checks that packing has changed nothing
		return err
	}
	if extents > manyExtents {
		logs.Warn("A template has many extents, which makes its clones slower: its data lie far from each other", "template", key, "extents", extents)
	}
	klog.InfoS("Built a template", "template", key, "duration", time.Since(start).Round(time.Millisecond), "extents", extents,
		"accelerator", r.Provenance.Accelerator, "kernel", r.Provenance.Kernel, "mkfs", r.Provenance.Mkfs)
	return nil
}

const (
	// fewExtents is how many extents an image may have that stays as it is: see [sparse.Pack].
	fewExtents = 32
	// manyExtents are those that take a clone a millisecond or two: about as long as all the rest of
	// a publish on demand, on a fast disk. It is logged, since a packed image rarely has so many.
	manyExtents = 100
)

// pack is [sparse.Pack] of an image of the pool.
func pack(ctx context.Context, newFile func() (*os.File, error), f *os.File) (*os.File, int, error) {
	packed, extents, err := sparse.Pack(ctx, newFile, f, fewExtents)
	return packed, extents, pool.Full(err)
}

// packed returns an image with the content of f in few extents: f itself, if it has few or the pool has no
// room for another one.
func (s *Store) packed(f *os.File, key string) (_ *os.File, extents int, err error) {
	packed, extents, err := pack(s.ctx, s.cfg.Pool.NewTemplate, f)
	if !errors.Is(err, pool.ErrFull) {
		return packed, extents, err
	}
	logs.Warn("A template stays in many extents, which makes its clones slower: the pool has no room to pack it", "template", key, "err", err)
	extents, err = fiemap.Count(f)
	return f, extents, err
}

// content formats f as spec says, and returns the record of the outcome.
func (s *Store) content(f *os.File, key string, spec diskfs.Spec, start time.Time, turn *turn) (Record, error) {
	made, err := s.cfg.Format(s.ctx, f, spec)
	turn.used = !errors.Is(err, ErrNoFormatter)
	if !turn.used { // Ensure says which template there is not
		return Record{}, err
	}
	if err != nil {
		return Record{}, fmt.Errorf("building template %s: %w", key, err)
	}
	if Key(spec, made.Fingerprint) != key {
		return Record{}, fmt.Errorf("%w: template %s: the fingerprint is %s now; try again", ErrChanged, key, made.Fingerprint)
	}
	sum, err := digest(f)
	if err != nil {
		return Record{}, err
	}
	return Record{
		Version: recordVersion, Key: key, Spec: spec, Provenance: made, Digest: sum,
		Built: start.UTC(), BuildMS: time.Since(start).Milliseconds(),
	}, nil
}

// publish gives a file its record, and then durably the name of its key. The key's lock is
// held and the key was looked up under it, so a file that still has that name is corrupt.
func (s *Store) publish(f *os.File, r Record) error {
	if err := pool.SetRecord(f, pool.TemplateAttr, r); err != nil {
		return err
	}
	if err := f.Chmod(0o400); err != nil { // nobody writes to a template again
		return err
	}
	// Every later hit must pass this check, so the file passes it before it gets its name.
	if _, err := verify(f, r.Key); err != nil {
		return err
	}
	path := s.cfg.Pool.Template(r.Key)
	if err := tmpfile.Remove(path); err != nil {
		return fmt.Errorf("%w: %s is in the way of a template: %w; move it away", pool.ErrUnusable, path, err)
	}
	if err := tmpfile.Publish(f, path); err != nil {
		return pool.Full(err)
	}
	if id, err := identify(f); err == nil { // the name has changed its ctime
		s.remember(f, id, r)
	}
	return nil
}
