// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
)

func newGoldenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "golden",
		Short: "List the goldens of a pool, make some, remove some, or hand one on",
		Long: `List the goldens of a pool, make some, remove some, or hand one on.

A golden is a filesystem that a volume left behind, for the next ones to start from. It
is called NAMESPACE/NAME, or NAME if it is shared, and one of its generations
NAMESPACE/NAME@NUMBER. All of these commands may run beside the plugin.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(goldensShown.listCommand(), goldensShown.describeCommand(), newGoldenRemoveCommand())
	cmd.AddCommand(newGoldenPromoteCommand(), newGoldenSnapshotCommand())
	return cmd
}

func newGoldenRemoveCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "rm [NAMESPACE/]NAME[@N]...",
		Short: "Remove all generations of goldens, or some",
		Long: `Remove all generations of goldens, or some. If one that is named does not exist,
nothing is removed. Volumes and snapshots that were made of one keep what they have.`,
		Example: `  csi-disktemplate golden rm shop/build-cache
  csi-disktemplate golden rm shop/build-cache@3 go-modules`,
		Args: namesOf(cobra.MinimumNArgs(1), "at least one golden"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openExisting(cmd, dir)
			if err != nil {
				return err
			}
			defer p.Close()
			return removeGoldens(golden.NewStore(p), args, cmd.OutOrStdout())
		},
		ValidArgsFunction: goldensShown.completion(&dir),
	}
	addExistingPool(cmd.Flags(), &dir)
	return cmd
}

// namesOf says what the arguments of a command must be, where cobra only counts them.
func namesOf(count cobra.PositionalArgs, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if count(cmd, args) == nil {
			return nil
		}
		return fmt.Errorf("name %s, as NAMESPACE/NAME, or NAME if it is shared; "+
			"`csi-disktemplate golden list` shows those that are there", what)
	}
}

// removeGoldens removes generations, and prints which.
func removeGoldens(s *golden.Store, texts []string, out io.Writer) error {
	chosen, err := s.Choose(texts...)
	if err != nil {
		return err
	}
	if err := s.RemoveDurably(chosen...); err != nil {
		return err
	}
	return printRemoved(out, chosen)
}

func printRemoved(out io.Writer, removed []golden.Generation) error {
	for _, g := range removed {
		if _, err := fmt.Fprintf(out, "Removed golden %s.\n", g); err != nil {
			return err
		}
	}
	return nil
}

// goldensShown are how goldens are shown.
var goldensShown = thing[admin.Golden]{
	one: "golden", many: "goldens", names: "[NAMESPACE/]NAME[@N]", example: "shop/build-cache",
	about: `Each generation has a line. The namespace of a shared golden is shown as -. USED is what
a generation has allocated, and OWN what no other file of the pool shares: as much is
free when that generation goes.`,
	detail: `NAMESPACE/NAME names all generations of a golden, the newest first, and with @N one.
Own bytes are free when the generation goes; shared ones are those of other files too,
for example of other generations or of volumes.`,
	list:      func(n admin.Node) ([]admin.Golden, error) { return n.Goldens() },
	name:      admin.Golden.String,
	also:      func(g admin.Golden) []string { return []string{g.Is()} },
	hint:      func(g admin.Golden) string { return g.Filesystem + " " + size.Format(g.Size) + " by " + g.By },
	lastFirst: true,
	columns: []column[admin.Golden]{
		{title: "NAMESPACE", text: func(g admin.Golden) string { return g.Namespace }},
		{title: "NAME", text: func(g admin.Golden) string { return g.Name }},
		{title: "GENERATION", text: func(g admin.Golden) string { return strconv.Itoa(g.Generation) }},
		{title: "FILESYSTEM", text: func(g admin.Golden) string { return g.Filesystem }},
		{title: "SIZE", text: func(g admin.Golden) string { return size.Format(g.Size) }},
		{title: "USED", text: func(g admin.Golden) string { return size.Format(g.Used) }},
		{title: "OWN", text: func(g admin.Golden) string { return size.Format(g.Own) }},
		{title: "AGE", text: func(g admin.Golden) string { return ageOf(g.Created) }},
		{title: "LAST USE", text: func(g admin.Golden) string { return timeText(&g.LastUse) }},
		{title: "BY", text: func(g admin.Golden) string { return g.By }},
		{title: "READY", wide: true, text: func(g admin.Golden) string { return readyText(g.Ready) }},
		{title: "VOLUME", wide: true, text: func(g admin.Golden) string { return g.Volume }},
		{title: "UUID", wide: true, text: func(g admin.Golden) string { return g.UUID }},
	},
	fields: func(g admin.Golden) []field {
		return append([]field{
			{"Filesystem", specText(g.Filesystem, g.Size, g.Label, g.Options, "")}, {"UUID", g.UUID},
			{"Used", size.Format(g.Used)}, {"  own", size.Format(g.Own)}, {"  shared", size.Format(g.Shared)},
			{"Created", sinceText(g.Created)}, {"Last use", timeText(&g.LastUse)}, {"By", g.By}, {"Volume", cmp.Or(g.Volume, "-")},
		}, readyFields(g.Ready)...)
	},
}
