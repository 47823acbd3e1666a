// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// gcOptions are the flags of `csi-disktemplate gc`.
type gcOptions struct {
	planOptions
	kubeletDir string
}

func newGCCommand() *cobra.Command {
	var o gcOptions
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what crashes and lost calls left behind",
		Long: `Remove what crashes, reboots and lost calls left behind.

The plugin does the same when it starts and at intervals afterwards. It removes inline
volumes whose pod is gone and loop devices that nobody uses any more, thaws filesystems
that were left frozen, and ends formatting VMs that nobody waits for. What is not
provably part of this pool, or not provably unused, is left alone and reported.

With --dry-run it prints the plan and changes nothing. That also works beside a running
plugin; VMs are not reported then, because they may belong to that plugin.
Without --dry-run no plugin may be running on the pool.`,
		Example: `  csi-disktemplate gc --dry-run
  csi-disktemplate gc --dry-run -o wide`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := openExisting(cmd, o.pool)
			if err != nil {
				return err
			}
			defer p.Close()
			return collect(cmd.Context(), p, o, cmd.OutOrStdout())
		},
	}
	o.add(cmd.Flags())
	addKubeletDir(cmd.Flags(), &o.kubeletDir)
	return cmd
}

// collect sweeps a pool and prints the actions.
func collect(ctx context.Context, p *pool.Pool, o gcOptions, out io.Writer) error {
	if !o.dryRun {
		owner, err := p.Own(ctx)
		if errors.Is(err, pool.ErrOwned) {
			return fmt.Errorf("%w; a running plugin sweeps by itself (--sweep-interval), and --dry-run shows what its next sweep would do", err)
		}
		if err != nil {
			return err
		}
		defer owner.Unlock()
	}
	m, err := volume.NewManager(volume.Config{Pool: p, TargetRoot: o.kubeletDir})
	if err != nil {
		return err
	}
	defer m.Close()
	// Beside a running plugin, half-made objects may be that plugin's. Only a sweep that owns
	// the pool is the First.
	actions, err := m.Sweep(ctx, sweep.Options{DryRun: o.dryRun, First: !o.dryRun})
	if err != nil && actions == nil {
		return err
	}
	return errors.Join(sweepPlan(actions).print(out, o.output), err, failed(actions))
}

// sweepPlan is how the actions are printed.
func sweepPlan(actions []sweep.Action) plan[sweep.Action] {
	return plan[sweep.Action]{
		actions: actions,
		columns: []column[sweep.Action]{
			{title: "ACTION", text: func(a sweep.Action) string { return string(a.Verb) }},
			{title: "OBJECT", text: func(a sweep.Action) string { return a.Object }},
			{title: "RESULT", text: func(a sweep.Action) string { return a.Result }},
			{title: "REASON", text: func(a sweep.Action) string { return a.Reason }},
			{title: "PATH", wide: true, text: func(a sweep.Action) string { return a.Path }},
		},
		none: "Nothing was left behind.",
	}
}
