// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/meant"
)

func newWhyCommand() *cobra.Command {
	var at whose
	var form string
	cmd := &cobra.Command{
		Use:   "why NAMESPACE/POD",
		Short: "Say what the volumes of a pod wait for on this node",
		Long: `Say what the volumes of a pod wait for on this node, and what to do: for a template that
is being built, and how far it is; for a content, for space, or because what the pod asks
for was refused. A pod is named NAMESPACE/NAME, or by its UID; the id of a volume, or the
name of a claim, does as well. It asks the running plugin, which remembers the last failed
call of each volume for 15 minutes: longer than Kubernetes waits before it asks again.`,
		Example: `  csi-disktemplate why shop/web-0
  csi-disktemplate why shop/web-0 -o json`,
		Args: func(cmd *cobra.Command, args []string) error {
			if cobra.ExactArgs(1)(cmd, args) == nil && args[0] != "" {
				return nil
			}
			return errors.New("name one pod, as NAMESPACE/NAME; `csi-disktemplate volume list` shows pods that have volumes here")
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return at.ask(cmd, func(n admin.Node) error { return why(cmd.OutOrStdout(), n, args[0], form) })
		},
		ValidArgsFunction: func(cmd *cobra.Command, given []string, _ string) (pods []cobra.Completion, _ cobra.ShellCompDirective) {
			if len(given) == 0 {
				at.quietly(cmd, func(n admin.Node) { pods = podsOf(n) })
			}
			return pods, cobra.ShellCompDirectiveNoFileComp
		},
	}
	addExistingPool(cmd.Flags(), &at.pool)
	addValueP(cmd.Flags(), &form, "output", "o", "", objectForm, "form of the answer (default: a text)")
	return cmd
}

// why prints what a pod waits for. A pod is an error if the node knows nothing that may be its volume.
func why(out io.Writer, n admin.Node, asked, form string) error {
	if n.Why == nil {
		return errors.New("only a running plugin knows what a pod waits for: start it, or read its log")
	}
	w, err := n.Why(asked)
	if err != nil {
		return err
	}
	if form != "" {
		return printObject(out, w, form)
	}
	if err := printWhy(out, w, "this node"); err != nil || len(w.Waits)+len(w.Volumes)+len(w.Others) > 0 {
		return err
	}
	return fmt.Errorf("this node knows no volume of %.200s; %s", asked, meant.Say(asked, podsOf(n),
		"the pod may be on another node, or kubelet has not asked for its volumes yet: see kubectl describe pod"))
}

// podsOf are the pods that a node knows, from its volumes and its calls.
func podsOf(n admin.Node) (pods []string) {
	add := func(p *admin.Pod) {
		if p != nil && p.Name != "" {
			pods = append(pods, p.String())
		}
	}
	if volumes, err := n.Volumes(); err == nil {
		for _, v := range volumes {
			add(v.Pod)
		}
	}
	if n.Requests != nil {
		calls, _ := n.Requests() // without them fewer pods are known
		for _, r := range slices.Concat(calls.UnderWay, calls.Failed) {
			add(r.Pod)
		}
	}
	slices.Sort(pods)
	return slices.Compact(pods)
}

// printWhy prints the answer of a node for people.
func printWhy(out io.Writer, w admin.Why, node string) error {
	var fields []field
	for _, wait := range w.Waits {
		fields = append(fields, waitFields(wait)...)
	}
	for _, v := range w.Volumes {
		if !slices.ContainsFunc(w.Waits, func(wait admin.Wait) bool { return wait.Volume == v.ID || wait.Volume == v.Claim }) {
			fields = append(fields, field{"Volume", v.ID}, field{"  state", string(v.State)}, field{"  at", lines(v.PublishedAt)})
			fields = append(fields, conditionsUnder(v.Conditions)...)
		}
	}
	for _, wait := range w.Others {
		fields = append(fields, append([]field{{name: "It may be its volume:"}}, waitFields(wait)...)...)
	}
	for _, f := range w.Findings {
		fields = append(fields, field{"Plugin", f.Code}, field{"  says", strings.TrimSuffix(f.Text+"\n"+f.Remedy, "\n")})
	}
	title := fmt.Sprintf("%s waits for %d of its volumes on %s.", w.Asked, len(w.Waits), node)
	if len(w.Waits) == 0 {
		title = fmt.Sprintf("%s waits for no volume on %s.", w.Asked, node)
	}
	return printFields(out, title, fields)
}

func conditionsUnder(conditions []admin.Condition) (fields []field) {
	for _, c := range conditions {
		fields = append(fields, field{"  " + c.Code, strings.TrimSuffix(c.Text+"\n"+c.Remedy, "\n")})
	}
	return fields
}

// waitFields describe what one volume waits for, or why it cannot be had.
func waitFields(w admin.Wait) []field {
	text, what := w.Text, "failed"
	if w.Cause == admin.CauseTemplate || w.Cause == admin.CauseBusy {
		what = "waits for"
	}
	if w.Percent != nil {
		text = fmt.Sprintf("%s (%d%%)", text, *w.Percent)
	}
	return []field{
		{"Volume", w.Volume}, {"  call", fmt.Sprintf("%s, %s", w.Method, sinceText(w.Since))},
		{"  " + what, text}, {"  because of", string(w.Cause)}, {"  do", w.Remedy},
	}
}
