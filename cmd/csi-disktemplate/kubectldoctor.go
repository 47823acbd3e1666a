// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/kubectl"
)

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
in the plugin's pods. It changes nothing.

The exit code is that of the worst node: 0 if all is good, 1 if something is degraded, and 2
if something is broken or a node does not answer.`,
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
func (f *fleet) doctor(ctx context.Context, node string) ([]nodeFindings, error) {
	pods, err := f.pods(ctx)
	if err == nil && node != "" {
		pods, err = on(pods, node)
	}
	if err != nil {
		return nil, err
	}
	found := make([]nodeFindings, len(pods))
	together(len(pods), func(i int) { found[i] = f.examined(ctx, pods[i]) })
	return found, nil
}

// examined is what doctor finds in a pod. A pod that does not answer is broken.
func (f *fleet) examined(ctx context.Context, p kubectl.Pod) (found nodeFindings) {
	err := f.ask(ctx, p, &found, "doctor")
	found.Node, found.Pod = p.Spec.NodeName, p.String()
	if err != nil {
		found.State, found.Error = health.StateBroken, err.Error()
		found.Findings.Findings = []health.Finding{} // a list in JSON, not null
	}
	return found
}

func printDoctor(out io.Writer, found []nodeFindings, form string) error {
	if form != "" {
		return printObject(out, map[string]any{"nodes": found}, form)
	}
	for i, n := range found {
		if i > 0 {
			fmt.Fprintln(out)
		}
		lines := printableLines(findingLines(n.Findings.Findings))
		if n.Error != "" {
			lines = fmt.Sprintf("%s  doctor could not look: %s\n", health.StateBroken, printable(n.Error))
		}
		fmt.Fprintln(out, printable(fmt.Sprintf("%s (%s): %s", n.Node, n.Pod, n.State)))
		for line := range strings.Lines(lines) {
			if _, err := io.WriteString(out, "  "+line); err != nil {
				return err
			}
		}
	}
	return nil
}

// worstOf is the exit code of all nodes.
func worstOf(nodes []nodeFindings) error {
	code := 0
	for _, n := range nodes {
		switch n.State {
		case health.StateBroken:
			code = exitBroken
		case health.StateDegraded:
			code = max(code, exitDegraded)
		}
	}
	if code == 0 {
		return nil
	}
	return &exit{code: code}
}
