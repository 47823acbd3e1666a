// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"

	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// planOptions are the flags of the commands that plan actions on the plugin's pool, show them,
// and carry them out.
type planOptions struct {
	pool, output string
	dryRun       bool
}

func (o *planOptions) add(f *pflag.FlagSet) {
	addExistingPool(f, &o.pool)
	f.BoolVar(&o.dryRun, "dry-run", false, "print the plan and change nothing")
	addValueP(f, &o.output, "output", "o", "", planForm, "form of the plan (default: a table)")
}

func addExistingPool(f *pflag.FlagSet, dir *string) {
	addValue(f, dir, "pool", defaultPool, given("must be the directory that the plugin was given as --pool"), "the plugin's pool directory")
}

// plan is a list of actions in the form in which it is printed.
type plan[A any] struct {
	actions []A
	name    string // of the list in the JSON; "" is "actions"
	columns []column[A]
	none    string         // printed instead of a table without rows
	sum     string         // printed below the table, unless empty
	sums    map[string]any // of the JSON, beside the actions
}

// print writes the plan as --output says.
func (p plan[A]) print(out io.Writer, form string) error {
	if form == "json" || form == "yaml" {
		return p.printObject(out, form)
	}
	if len(p.actions) == 0 {
		_, err := fmt.Fprintln(out, p.none)
		return err
	}
	err := printTable(out, p.columns, p.actions, form)
	if err == nil && p.sum != "" {
		_, err = fmt.Fprintln(out, p.sum)
	}
	return err
}

func (p plan[A]) printObject(out io.Writer, form string) error {
	name := cmp.Or(p.name, "actions")
	all := map[string]any{name: p.actions}
	if p.actions == nil {
		all[name] = []A{} // an empty list in JSON, not null
	}
	maps.Copy(all, p.sums)
	return printObject(out, all, form)
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
