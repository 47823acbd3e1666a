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
		Short: "Take away what crashes and lost calls have left behind",
		Long: `Take away what crashes, reboots and lost calls have left behind.

It is what the plugin does when it starts, and every now and then afterwards: inline
volumes whose pod is gone, loop devices that nobody uses any more, filesystems that were
left frozen, formatting VMs that nobody waits for. What is not provably of this pool, or
not provably of no more use, is left and reported.

With --dry-run it prints the plan and changes nothing, also beside a running plugin; it
says nothing of VMs then, which may be that plugin's.
Without, no plugin may be running on the pool.`,
		Example: `  csi-disktemplate gc --pool /var/lib/csi-disktemplate --dry-run
  csi-disktemplate gc --pool /var/lib/csi-disktemplate --dry-run -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return collect(cmd.Context(), o, cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.pool, "pool", "", "the plugin's pool directory (required)")
	addKubeletDir(f, &o.kubeletDir)
	f.BoolVar(&o.dryRun, "dry-run", false, "print the plan and change nothing")
	f.StringVarP(&o.output, "output", "o", "", "form of the plan: json, or a table if not given")
	return cmd
}

// collect sweeps a pool by hand.
func collect(ctx context.Context, o gcOptions, out io.Writer) error {
	if o.output != "" && o.output != "json" {
		return fmt.Errorf("--output %q: must be json, or not given", o.output)
	}
	p, err := pool.OpenExisting(o.pool)
	if err != nil {
		return err
	}
	defer p.Close()
	if !o.dryRun {
		owner, err := p.Own(ctx)
		if errors.Is(err, pool.ErrOwned) {
			return fmt.Errorf("%w (it sweeps by itself, see its --sweep-interval; --dry-run shows what the next sweep would do)", err)
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
	// Beside a living plugin, what is half-made may be its.
	actions, err := m.Sweep(ctx, volume.Sweep{DryRun: o.dryRun, First: !o.dryRun})
	if err != nil && actions == nil {
		return err
	}
	show := printTable
	if o.output == "json" {
		show = printJSON
	}
	return errors.Join(show(out, actions), err, failed(actions))
}

// failed makes the command fail with its actions.
func failed(actions []volume.Action) error {
	n := 0
	for _, a := range actions {
		if a.Failed() {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d actions failed: see their results", n, len(actions))
}

func printJSON(out io.Writer, actions []volume.Action) error {
	if actions == nil {
		actions = []volume.Action{} // and not null
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(map[string]any{"actions": actions})
}

func printTable(out io.Writer, actions []volume.Action) error {
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
