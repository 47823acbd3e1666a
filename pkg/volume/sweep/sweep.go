// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package sweep removes what crashes, reboots and lost calls have left on the node.
//
// It first looks (look.go), then decides (plan.go, pure), then acts (act.go). Before each
// action it locks the volume, looks again and decides again. It removes a thing only with
// the proof that it is this pool's and that nobody uses it any more. It leaves and reports
// everything else that looks odd.
//
// A pool has one plugin, which holds a lock as long as it lives ([pool.Pool.Own]). So
// everything half-made that is not this plugin's own is dead. A pid proves nothing.
package sweep

import (
	"context"
	"errors"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// Config is what a Sweeper works with. All of it is required, unless it says otherwise.
type Config struct {
	Pool    *pool.Pool
	Images  *image.Store
	Goldens *golden.Store
	Root    *place.Root
	Quota   *quota.Ledger
	Space   *space.Space
	// Lock keeps other operations from a volume until unlock is called. An error leaves the
	// volume to the next sweep.
	Lock func(id string) (unlock func(), err error)
	// Thaw thaws a volume's filesystem if a plugin froze it and died, or returns
	// [ErrOutdated].
	Thaw func(ctx context.Context, id string) error
	// Commit begins to commit a volume that is kept for that, unless it has begun already. With nil, which is for a
	// process that ends with its sweep, such volumes are left to the plugin.
	Commit func(id string)
}

// ErrOutdated means that an action no longer fits, because the node has changed since it was
// planned.
var ErrOutdated = errors.New("it is no longer so")

// Sweeper sweeps a pool. One sweep runs at a time.
type Sweeper struct {
	Config
	reported map[string]bool // what the last sweep left and reported
}

// New returns a Sweeper.
func New(c Config) *Sweeper { return &Sweeper{Config: c} }

// Options say how to sweep.
type Options struct {
	// DryRun makes the plan and changes nothing. It is allowed beside a running plugin.
	// Any other sweep is for the owner of the pool only: see [pool.Pool.Own].
	DryRun bool
	// First means that this process has not begun to work yet. So everything half-made is
	// another process's, and dead.
	First bool
}

// Sweep sweeps, and returns the plan with the result of each action. An error without
// actions means that no sweep happened. An error with actions means that ctx ended after
// them.
func (s *Sweeper) Sweep(ctx context.Context, o Options) ([]Action, error) {
	// If the path leads to another pool by now, every conclusion would be wrong.
	err := s.Pool.Check()
	if err == nil {
		err = s.Space.Recount() // several records at a time; the ledger finds them read
	}
	if err == nil {
		err = s.Quota.Recount()
	}
	var found finds
	if err == nil {
		found, err = s.find(o.First)
	}
	if err != nil {
		return nil, fmt.Errorf("looking for what was left behind: %w", err)
	}
	actions := found.plan()
	if o.DryRun {
		return actions, nil
	}
	for i := range actions {
		if ctx.Err() != nil {
			actions = actions[:i]
			break
		}
		s.carryOut(context.WithoutCancel(ctx), &actions[i]) // what has begun is finished
	}
	s.reported = report(actions, s.reported)
	return actions, context.Cause(ctx)
}

// report logs every action. It logs what was left only if the sweep before did not leave
// it too.
func report(actions []Action, before map[string]bool) map[string]bool {
	left := map[string]bool{}
	for _, a := range actions {
		pairs := []any{"object", a.Object, "path", a.Path, "reason", a.Reason, "result", a.Result}
		switch {
		case a.Verb != Leave && a.Result != Skipped:
			klog.InfoS("Sweep: "+string(a.Verb), pairs...)
		case a.Verb == Leave:
			key := a.Path + " " + a.Reason
			if left[key] = true; !before[key] {
				klog.InfoS("Sweep: leave", pairs...)
			}
		}
	}
	return left
}
