// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
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
	cmd.AddCommand(newGoldenListCommand(), newGoldenDescribeCommand(), newGoldenRemoveCommand())
	cmd.AddCommand(newGoldenPromoteCommand(), newGoldenSnapshotCommand())
	return cmd
}

func newGoldenListCommand() *cobra.Command {
	var dir, form string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the goldens of a pool",
		Long: `List the goldens of a pool, each generation in a line.

The namespace of a shared golden is shown as -. USED is what a generation has allocated,
and OWN what no other file of the pool shares: as much is free when that generation goes.`,
		Example: `  csi-disktemplate golden list
  csi-disktemplate golden list -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := openExisting(cmd, dir)
			if err != nil {
				return err
			}
			defer p.Close()
			all, err := golden.NewStore(p).DescribeAll()
			if err != nil && len(all) == 0 {
				return err
			}
			return errors.Join(listOfGoldens(all, time.Now()).print(cmd.OutOrStdout(), form), err)
		},
	}
	addExistingPool(cmd.Flags(), &dir)
	addValueP(cmd.Flags(), &form, "output", "o", "", outputForm, "form of the list (default: a table)")
	return cmd
}

func newGoldenDescribeCommand() *cobra.Command {
	var dir, form string
	cmd := &cobra.Command{
		Use:   "describe [NAMESPACE/]NAME[@N]",
		Short: "Show all generations of a golden, or one",
		Long: `Show all generations of a golden, or one: what they are, who made them, and what
they take of the pool. Own bytes are free when the generation goes; shared ones are
those of other files too, for example of other generations or of volumes.`,
		Example: `  csi-disktemplate golden describe shop/build-cache
  csi-disktemplate golden describe shop/build-cache@3 -o json`,
		Args: namesOf(cobra.ExactArgs(1), "one golden"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openExisting(cmd, dir)
			if err != nil {
				return err
			}
			defer p.Close()
			all, err := describeGolden(golden.NewStore(p), args[0])
			if err != nil {
				return err
			}
			if form == "json" {
				return listOfGoldens(all, time.Now()).print(cmd.OutOrStdout(), form)
			}
			return printGoldens(cmd.OutOrStdout(), all)
		},
	}
	addExistingPool(cmd.Flags(), &dir)
	addValueP(cmd.Flags(), &form, "output", "o", "", outputForm, "form of what is shown (default: a text)")
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

// describeGolden describes the generations that a text names.
func describeGolden(s *golden.Store, text string) (all []golden.Described, err error) {
	chosen, err := s.Choose(text)
	if err != nil {
		return nil, err
	}
	for _, g := range chosen {
		d, err := s.Describe(g)
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
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

// listedGolden is a generation as it is printed.
type listedGolden struct {
	Namespace  string            `json:"namespace,omitempty"`
	Name       string            `json:"name"`
	Generation int               `json:"generation"`
	Filesystem string            `json:"filesystem"`
	Size       int64             `json:"sizeBytes"`
	Label      string            `json:"label,omitempty"`
	Options    map[string]string `json:"formatOptions,omitempty"`
	UUID       uuid.UUID         `json:"uuid"`
	Used       int64             `json:"usedBytes"`
	Own        int64             `json:"ownBytes"`
	Shared     int64             `json:"sharedBytes"`
	Created    time.Time         `json:"created"`
	LastUse    time.Time         `json:"lastUse"`
	By         string            `json:"by"`
	Volume     string            `json:"volume,omitempty"`

	is  golden.Generation
	age time.Duration
}

func listedAs(d golden.Described, now time.Time) listedGolden {
	r := d.Record
	return listedGolden{
		Namespace: r.Namespace, Name: r.Name, Generation: r.Generation,
		Filesystem: r.Spec.Filesystem, Size: r.Spec.Size, Label: r.Spec.Label, Options: r.Spec.Options, UUID: r.UUID,
		Used: d.Bytes, Own: d.Own, Shared: d.Shared(),
		Created: r.Created.UTC().Truncate(time.Second), LastUse: d.Used.UTC().Truncate(time.Second),
		By: r.By, Volume: r.Volume,
		is: d.Generation, age: now.Sub(r.Created),
	}
}

// listOfGoldens says how generations are printed.
func listOfGoldens(all []golden.Described, now time.Time) plan[listedGolden] {
	var list []listedGolden
	for _, d := range all {
		list = append(list, listedAs(d, now))
	}
	return plan[listedGolden]{
		actions: list, name: "goldens", none: "There are no goldens.",
		columns: "NAMESPACE\tNAME\tGENERATION\tFILESYSTEM\tSIZE\tUSED\tOWN\tAGE\tLAST USE\tBY",
		row: func(l listedGolden) string {
			return strings.Join([]string{
				cmp.Or(l.Namespace, "-"), l.Name, strconv.Itoa(l.Generation), l.Filesystem,
				size.Format(l.Size), size.Format(l.Used), size.Format(l.Own),
				duration.HumanDuration(l.age), l.LastUse.Format(time.DateTime + "Z"), l.By,
			}, "\t")
		},
	}
}

// printGoldens prints generations as texts, the newest first.
func printGoldens(out io.Writer, all []golden.Described) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for i, d := range slices.Backward(all) {
		if i < len(all)-1 {
			fmt.Fprintln(w)
		}
		l := listedAs(d, time.Now())
		fmt.Fprintln(w, l.is)
		for _, field := range []struct{ name, value string }{
			{"Filesystem", diskfs.Spec{Filesystem: l.Filesystem, Size: l.Size, Label: l.Label, Options: l.Options}.String()},
			{"UUID", l.UUID.String()},
			{"Used", size.Format(l.Used)},
			{"  own", size.Format(l.Own)},
			{"  shared", size.Format(l.Shared)},
			{"Created", fmt.Sprintf("%s (%s ago)", l.Created.Format(time.DateTime+"Z"), duration.HumanDuration(l.age))},
			{"Last use", l.LastUse.Format(time.DateTime + "Z")},
			{"By", l.By},
			{"Volume", cmp.Or(l.Volume, "-")},
		} {
			fmt.Fprintf(w, "  %s\t%s\n", field.name, field.value)
		}
	}
	return w.Flush()
}
