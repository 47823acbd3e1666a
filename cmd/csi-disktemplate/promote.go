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
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
)

// promoteOptions are the flags of `csi-disktemplate golden promote`.
type promoteOptions struct {
	buildOptions
	snapshot    string
	generations int
}

func newGoldenPromoteCommand() *cobra.Command {
	var o promoteOptions
	cmd := &cobra.Command{
		Use:   "promote (--snapshot ID | --content NAME --size SIZE) [NAMESPACE/]NAME",
		Short: "Make a claim's snapshot, or a content, the newest generation of a golden",
		Long: `Make a claim's snapshot, or a content, the newest generation of a golden. It may run
beside the plugin. --snapshot takes the id on this node, which a VolumeSnapshotContent
has as its snapshotHandle. With --content a template with that content is built first,
unless it is there, as the command template build does it. Volumes that started from an
older generation keep what they have.`,
		Example: `  csi-disktemplate golden promote --snapshot snapshot-4f0c shop/build-cache
  csi-disktemplate golden promote --contents contents.yaml --content-dir . --content go-modules --size 1Gi go-modules`,
		Args: namesOf(cobra.ExactArgs(1), "one golden"),
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := golden.ParseName(args[0])
			if err == nil {
				err = o.check()
			}
			if err != nil {
				return err
			}
			p, err := openExisting(cmd, o.pool)
			if err != nil {
				return err
			}
			defer p.Close()
			return promote(cmd.Context(), p, o, to, cmd.OutOrStdout())
		},
		ValidArgsFunction: goldensShown.completion(&o.pool),
	}
	f := cmd.Flags()
	o.add(f)
	f.StringVar(&o.snapshot, "snapshot", "", "what the golden has: the `id` of a snapshot of a claim")
	addValue(f, &o.generations, "golden-generations", "2", upperCount[int](),
		"how many generations the golden may have; the oldest are removed; 0 means no limit")
	_ = cmd.RegisterFlagCompletionFunc("snapshot", snapshots.completion(&o.pool))
	_ = cmd.RegisterFlagCompletionFunc("content", contents.completion(&o.pool))
	return cmd
}

// check refuses flags that do not go together.
func (o promoteOptions) check() error {
	switch {
	case o.snapshot != "" && o.content != "":
		return errors.New("--snapshot and --content: a golden has one of them; leave one out")
	case o.snapshot == "" && o.content == "":
		return errors.New("nothing to promote: give --snapshot ID, or --content NAME and --size")
	case o.content != "" && o.size == "":
		return errors.New("--content: give --size too, which volumes of the golden then have")
	}
	return nil
}

// promote makes a generation, and prints what was made and removed.
func promote(ctx context.Context, p *pool.Pool, o promoteOptions, to golden.Name, out io.Writer) error {
	promoter := volume.NewPromoter(p)
	if o.snapshot != "" {
		made, err := promoter.Snapshot(ctx, o.snapshot, to, o.generations)
		return printPromoted(out, made, "snapshot "+o.snapshot, err)
	}
	o.accept = volume.CheckPromotable
	return o.withTemplate(ctx, p, out, func(t *template.Template) error {
		made, err := promoter.Template(ctx, t, to, o.generations)
		return printPromoted(out, made, "content "+o.content, err)
	})
}

// printPromoted prints what was made, even if removing older generations failed.
func printPromoted(out io.Writer, made volume.Promoted, of string, err error) error {
	if made.Number == 0 {
		return err
	}
	_, e := fmt.Fprintf(out, "Golden %s was made of %s.\n", made.Generation, of)
	if err != nil {
		return fmt.Errorf("older generations were not removed: %w", errors.Join(err, e))
	}
	return errors.Join(e, printRemoved(out, made.Gone))
}
