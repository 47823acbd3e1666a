// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// idlePoll is the pause between two looks whether callers wait for builds. A build takes 0.5 s or
// more, and what is built ahead is in no hurry.
const idlePoll = 100 * time.Millisecond

// Retain says which templates are trimmed only after all others. It replaces what an earlier call
// said. A spec need not have a template.
func (s *Store) Retain(specs []diskfs.Spec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retained = slices.Clone(specs)
}

// retainedKeys returns the keys of the templates that are retained. A spec whose fingerprint cannot
// be told is left out: a machine that cannot tell it does not build, and so does not trim.
func (s *Store) retainedKeys() map[string]bool {
	s.mu.Lock()
	specs := s.retained
	s.mu.Unlock()
	keys := map[string]bool{}
	for _, spec := range specs {
		if key, err := s.KeyOf(spec); err == nil {
			keys[key] = true
		}
	}
	return keys
}

// Has reports whether there is a file of the name of spec's template. It reads no content. If the
// fingerprint cannot be told, it assumes that there is.
func (s *Store) Has(spec diskfs.Spec) bool {
	key, err := s.KeyOf(spec)
	return err != nil || s.exists(key)
}

func (s *Store) exists(key string) bool {
	_, err := os.Lstat(s.cfg.Pool.Template(key))
	return !errors.Is(err, os.ErrNotExist)
}

// Prewarm builds the template of spec, if there is none, before anybody asks for it. used is the last
// use to note for a new template; zero is now. Finding the template is no use of it.
//
// It begins when no other build is under way in this process. So it is never ahead of a caller of
// [Store.Ensure], unless that one asks later and finds no slot or VM free. It does not count for
// [Config].BuildsPerHour.
//
// Errors are those of Ensure, and [ErrNoRoom].
func (s *Store) Prewarm(ctx context.Context, spec diskfs.Spec, used time.Time) error {
	spec, err := templateOf(spec)
	if err != nil {
		return err
	}
	key, err := s.resolved(ctx, spec)
	if err != nil && !errors.Is(err, ErrNoContent) && !errors.Is(err, ErrBuilding) {
		err = fmt.Errorf("%w: %w", ErrNoFormatter, err)
	}
	if err != nil {
		return err
	}
	defer s.hold(key)()
	t, err := s.Lookup(key)
	if err == nil {
		return t.Close()
	}
	if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, ErrCorrupt) {
		return err
	}
	if err := s.hasRoom(); err != nil {
		return err
	}
	if err := s.idle(ctx); err != nil {
		return err
	}
	return s.join(ctx, key, spec, purpose{ahead: true, used: used})
}

// hasRoom returns [ErrNoRoom] if the templates that are retained take all of the budget: another one
// would push out one of them.
func (s *Store) hasRoom() error {
	budget, err := s.budget()
	if err != nil {
		return err
	}
	entries, err := s.entries(nil)
	if err != nil {
		return err
	}
	var sum int64
	for _, e := range entries {
		if e.retain {
			sum += e.bytes
		}
	}
	if sum < budget {
		return nil
	}
	return fmt.Errorf("%w: those that --prewarm and --prewarm-file list take %s of the %s of --template-cache; "+
		"list fewer, or raise it", ErrNoRoom, size.Format(sum), size.Format(budget))
}

// idle waits until no build is under way in this process.
func (s *Store) idle(ctx context.Context) error {
	tick := time.NewTicker(idlePoll)
	defer tick.Stop()
	for s.queue.busy() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	return nil
}
