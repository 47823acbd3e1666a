// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// gcOptions are the flags of `csi-disktemplate gc`.
type gcOptions struct {
	pool, kubeletDir, output string
	dryRun                   bool
}

func newGCCommand() *cobra.Command {
	var o gcOptions
	cmd := &cobra.Command{
		Use:   "gc --pool DIR",
		Short: "Remove what crashes and lost calls left behind",
		Long: `Remove what crashes, reboots and lost calls left behind.

The plugin does the same when it starts and at intervals afterwards. It removes inline
volumes whose pod is gone and loop devices that nobody uses any more, thaws filesystems
that were left frozen, and ends formatting VMs that nobody waits for. What is not
provably part of this pool, or not provably unused, is left alone and reported.

With --dry-run it prints the plan and changes nothing. That also works beside a running
plugin; VMs are not reported then, because they may belong to that plugin.
Without --dry-run no plugin may be running on the pool.`,
		Example: `  csi-disktemplate gc --pool /var/lib/csi-disktemplate --dry-run
  csi-disktemplate gc --pool /var/lib/csi-disktemplate --dry-run -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return collect(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	addExistingPool(f, &o.pool)
	addKubeletDir(f, &o.kubeletDir)
	f.BoolVar(&o.dryRun, "dry-run", false, "print the plan and change nothing")
	addValueP(f, &o.output, "output", "o", "", outputForm, "form of the plan (default: a table)")
	return cmd
}

// outputForm is json, or nothing for a table.
var outputForm = kindOf("json", "must be json, or not given for a table", func(s string) (string, bool) {
	return s, s == "" || s == "json"
})

// collect sweeps a pool and prints the actions.
func collect(ctx context.Context, o gcOptions, out io.Writer) error {
	p, err := pool.OpenExisting(o.pool)
	if err != nil {
		return err
	}
	defer p.Close()
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
	show := printTable
	if o.output == "json" {
		show = printJSON
	}
	return errors.Join(show(out, actions), err, failed(actions))
}

// failed returns an error if any action failed.
func failed(actions []sweep.Action) error {
	n := 0
	for _, a := range actions {
		if a.Failed() {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d actions failed; the results say why", n, len(actions))
}

func printJSON(out io.Writer, actions []sweep.Action) error {
	if actions == nil {
		actions = []sweep.Action{} // an empty list in JSON, not null
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(map[string]any{"actions": actions})
}

func printTable(out io.Writer, actions []sweep.Action) error {
	if len(actions) == 0 {
		_, err := fmt.Fprintln(out, "Nothing was left behind.")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ACTION\tOBJECT\tRESULT\tREASON")
	for _, a := range actions {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", a.Verb, a.Object, cmp.Or(a.Result, "-"), a.Reason)
	}
	return w.Flush()
}
