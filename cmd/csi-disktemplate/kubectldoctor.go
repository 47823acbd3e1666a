// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

// clusterFindings are what doctor found on all nodes, and whether these are all.
type clusterFindings struct {
	Nodes   []nodeFindings   `json:"nodes"`
	Cluster []health.Finding `json:"cluster"` // empty if one node was asked for
}

// nodeFindings are what doctor found on one node, or why it could not look.
type nodeFindings struct {
	Node  string       `json:"node"`
	Pod   string       `json:"pod"` // NAMESPACE/NAME
	State health.State `json:"state"`
	driver.Findings
	Error string `json:"error,omitempty"`
}

func (f *fleet) doctorCommand() *cobra.Command {
	var node, form string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what the plugin needs on each node, and what of it is missing",
		Long: `Say what the plugin needs on each node, and what of it is missing, by csi-disktemplate doctor
in the plugin's pods, and whether each node that is to have the plugin has a pod of it. It
changes nothing.

The exit code is that of the worst node: 0 if all is good, 1 if something is degraded, and 2
if something is broken, a node does not answer, or a node lacks the plugin.`,
		Example: `  kubectl disktemplate doctor
  kubectl disktemplate doctor --node node1
  kubectl disktemplate doctor --all-nodes -o json`,
		Args:              func(cmd *cobra.Command, args []string) error { return unwell(cobra.NoArgs(cmd, args)) },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return unwell(refuse(cmd.Flags())) },
		RunE: func(cmd *cobra.Command, _ []string) error {
			if node != "" && cmd.Flags().Changed("all-nodes") {
				return unwell(errors.New("give --node or --all-nodes, not both"))
			}
			found, err := f.doctor(cmd.Context(), node)
			if err == nil {
				err = printDoctor(cmd.OutOrStdout(), found, form)
			}
			if err != nil {
				return unwell(err)
			}
			return worstOf(found)
		},
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return unwell(flagError(cmd, err)) })
	cmd.Flags().BoolVar(new(bool), "all-nodes", true, "look at all nodes, unless --node is given")
	cmd.Flags().StringVar(&node, "node", "", "look at this node only")
	addValueP(cmd.Flags(), &form, "output", "o", "", objectForm, "form of the findings (default: lines)")
	return cmd
}

// doctor has doctor look at a node, or at all.
func (f *fleet) doctor(ctx context.Context, node string) (found clusterFindings, err error) {
	pods, err := f.pods(ctx)
	if err == nil && node != "" {
		pods, err = on(pods, node)
	}
	if err != nil {
		return found, err
	}
	found = clusterFindings{Nodes: make([]nodeFindings, len(pods)), Cluster: []health.Finding{}}
	together(len(pods), func(i int) { found.Nodes[i] = f.examined(ctx, pods[i]) })
	if node == "" {
		found.Cluster = f.spread(ctx, pods)
	}
	return found, nil
}

// examination is what csi-disktemplate doctor prints.
type examination struct {
	State health.State `json:"state"`
	driver.Findings
}

// check refuses what says nothing, and what contradicts itself.
func (e *examination) check() error {
	states := []health.State{health.StateGood, health.StateDegraded, health.StateBroken}
	if !slices.Contains(states, e.State) {
		return fmt.Errorf("its state is %.40q, which is none of good, degraded and broken", e.State)
	}
	if len(e.Findings.Findings) == 0 {
		return errors.New("it has no findings")
	}
	for _, f := range e.Findings.Findings {
		if !slices.Contains(states, f.State) {
			return fmt.Errorf("the state of a finding is %.40q, which is none of good, degraded and broken", f.State)
		}
	}
	if worst := health.Worst(e.Findings.Findings); worst != e.State {
		return fmt.Errorf("its state is %s, and the worst of its findings is %s", e.State, worst)
	}
	return nil
}

// examined is what doctor finds in a pod. A pod that does not answer is broken.
func (f *fleet) examined(ctx context.Context, p kubectl.Pod) nodeFindings {
	var e examination
	if err := f.ask(ctx, p, &e, "doctor"); err != nil {
		none := driver.Findings{Findings: []health.Finding{}} // a list in JSON, not null
		return nodeFindings{Node: p.Spec.NodeName, Pod: p.String(), State: health.StateBroken, Findings: none, Error: err.Error()}
	}
	return nodeFindings{Node: p.Spec.NodeName, Pod: p.String(), State: e.State, Findings: e.Findings}
}

func printDoctor(out io.Writer, found clusterFindings, form string) error {
	if form != "" {
		return printObject(out, found, form)
	}
	for i, n := range found.Nodes {
		lines := findingLines(n.Findings.Findings)
		if n.Error != "" {
			lines = fmt.Sprintf("%s  doctor could not look: %s\n", health.StateBroken, printable(n.Error))
		}
		if err := printUnder(out, i > 0, fmt.Sprintf("%s (%s): %s", n.Node, n.Pod, n.State), lines); err != nil {
			return err
		}
	}
	if len(found.Cluster) == 0 {
		return nil
	}
	return printUnder(out, true, fmt.Sprintf("All nodes: %s", health.Worst(found.Cluster)), findingLines(found.Cluster))
}

// printUnder prints lines below a title, after an empty line if something stands before it.
func printUnder(out io.Writer, more bool, title, lines string) error {
	if more {
		fmt.Fprintln(out)
	}
	fmt.Fprintln(out, printable(title))
	for line := range strings.Lines(lines) {
		if _, err := io.WriteString(out, "  "+line); err != nil {
			return err
		}
	}
	return nil
}

// worstOf is the exit code of all nodes. What is neither good nor degraded is broken.
func worstOf(found clusterFindings) error {
	states := []health.State{health.Worst(found.Cluster)}
	for _, n := range found.Nodes {
		states = append(states, n.State)
	}
	code := 0
	for _, s := range states {
		switch s {
		case health.StateGood:
		case health.StateDegraded:
			code = max(code, exitDegraded)
		default:
			code = exitBroken
		}
	}
	if code == 0 {
		return nil
	}
	return &exit{code: code}
}
