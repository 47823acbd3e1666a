// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

func newCleanAllCommand() *cobra.Command {
	var o planOptions
	cmd := &cobra.Command{
		Use:   "clean-all",
		Short: "Remove every cached template that is not being built",
		Long: `Remove every cached template that is not being built.

Volumes keep the data that they cloned. So a template frees only the space that no
volume shares with it. A running plugin builds a template again when a volume needs
it. A template whose lock another process holds is left alone.

With --dry-run it lists the templates and removes none.`,
		Example: `  csi-disktemplate clean-all --dry-run
  csi-disktemplate clean-all -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := openExisting(cmd, o.pool)
			if err != nil {
				return err
			}
			defer p.Close()
			return cleanAll(template.NewStore(template.Config{Pool: p}), p, o, cmd.OutOrStdout())
		},
	}
	o.add(cmd.Flags())
	return cmd
}

// cleaning is the action on one template.
type cleaning struct {
	sweep.Action
	Key        string     `json:"key"`
	Filesystem string     `json:"filesystem"`
	Size       int64      `json:"sizeBytes"`
	Takes      int64      `json:"takesBytes"`
	Frees      int64      `json:"freesBytes"`
	Used       *time.Time `json:"lastUsed,omitempty"`
}

// cleanAll removes the templates of a pool and prints the actions.
func cleanAll(store *template.Store, p *pool.Pool, o planOptions, out io.Writer) error {
	templates, err := store.List()
	if err != nil {
		return err
	}
	actions := planCleaning(templates, p.Template)
	if !o.dryRun {
		for i := range actions {
			actions[i].carryOut(store)
		}
	}
	var plain []sweep.Action
	for _, a := range actions {
		plain = append(plain, a.Action)
	}
	return errors.Join(cleaningPlan(actions, o.dryRun).print(out, o.output), failed(plain))
}

// planCleaning decides what is done with each template.
func planCleaning(templates []template.Cached, path func(key string) string) []cleaning {
	var actions []cleaning
	for _, t := range templates {
		a := cleaning{
			Action: sweep.Action{Verb: sweep.Delete, Object: "template " + t.Key, Path: path(t.Key), Reason: "no process builds or replaces it"},
			Key:    t.Key, Filesystem: t.Filesystem, Size: t.Size, Takes: t.Takes, Frees: t.Frees,
		}
		if !t.Used.IsZero() {
			used := t.Used.UTC().Truncate(time.Second)
			a.Used = &used
		}
		if shared := t.Takes - t.Frees; shared > 0 {
			a.Reason += fmt.Sprintf("; volumes keep the %s that they share with it", size.Format(shared))
		}
		if t.Holder != "" {
			a.Verb, a.Frees, a.Reason = sweep.Leave, 0, "it is locked, as while it is built, by "+t.Holder
		}
		actions = append(actions, a)
	}
	return actions
}

func (a *cleaning) carryOut(store *template.Store) {
	if a.Verb == sweep.Leave {
		return
	}
	removed, err := store.Remove(a.Key)
	switch {
	case err != nil:
		a.Result = err.Error()
	case removed:
		a.Result = sweep.Done
	default:
		a.Result = sweep.Skipped
	}
}

func (a cleaning) lastUsed() string {
	if a.Used == nil {
		return ""
	}
	return a.Used.Format(time.DateTime + "Z")
}

// cleaningPlan says how the actions are printed.
func cleaningPlan(actions []cleaning, dryRun bool) plan[cleaning] {
	var takes, frees int64
	removed := 0
	for _, a := range actions {
		takes += a.Takes
		if a.Result == sweep.Done || dryRun && a.Verb == sweep.Delete {
			frees += a.Frees
			removed++
		}
	}
	verb := "removed, which freed"
	if dryRun {
		verb = "to be removed, which frees"
	}
	return plan[cleaning]{
		actions: actions,
		columns: []column[cleaning]{
			{title: "ACTION", text: func(a cleaning) string { return string(a.Verb) }},
			{title: "TEMPLATE", text: func(a cleaning) string { return a.Key }},
			{title: "FILESYSTEM", text: func(a cleaning) string { return a.Filesystem }},
			{title: "SIZE", text: func(a cleaning) string { return size.Format(a.Size) }},
			{title: "TAKES", text: func(a cleaning) string { return size.Format(a.Takes) }},
			{title: "FREES", text: func(a cleaning) string { return size.Format(a.Frees) }},
			{title: "LAST USED", text: cleaning.lastUsed},
			{title: "RESULT", text: func(a cleaning) string { return a.Result }},
			{title: "REASON", text: func(a cleaning) string { return a.Reason }},
			{title: "PATH", wide: true, text: func(a cleaning) string { return a.Path }},
		},
		none: "There are no templates.",
		sum:  fmt.Sprintf("Templates: %d, which take %s; %d %s %s.", len(actions), size.Format(takes), removed, verb, size.Format(frees)),
		sums: map[string]any{"takesBytes": takes, "freesBytes": frees},
	}
}
