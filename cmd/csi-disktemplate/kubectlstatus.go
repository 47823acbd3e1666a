// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// clusterStatus is how the plugin is on all nodes, and what keeps it from being on others.
type clusterStatus struct {
	Nodes   []nodeStatus     `json:"nodes"`
	Cluster []health.Finding `json:"cluster"`
}

// nodeStatus is how the plugin is on one node, or why that is not known.
type nodeStatus struct {
	Node   string        `json:"node"`
	Pod    string        `json:"pod"` // NAMESPACE/NAME
	Ready  bool          `json:"ready"`
	Status *admin.Status `json:"status,omitempty"`
	Error  string        `json:"error,omitempty"`
}

func (f *fleet) statusCommand() *cobra.Command {
	var form string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the plugin of each node, and what is wrong there",
		Long: `Show the plugin of each node: a line for each, with its pod, version, pool, volumes and the
worst that is wrong there. A node that does not answer has a line, which says why. The nodes
are asked at the same time, by csi-disktemplate status in the plugin's pods. Below the table
stands how many nodes are to have the plugin and do not.`,
		Example: `  kubectl disktemplate status
  kubectl disktemplate status --context staging -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.status(cmd.Context())
			if err != nil {
				return err
			}
			return printNodes(cmd.OutOrStdout(), s, form)
		},
	}
	addValueP(cmd.Flags(), &form, "output", "o", "", objectForm, "form of the list (default: a table)")
	return cmd
}

// statusAnswer is what csi-disktemplate status prints.
type statusAnswer struct{ admin.Status }

func (s *statusAnswer) check() error {
	if s.Plugin.Version == "" {
		return errors.New("it does not say which version the plugin has")
	}
	return nil
}

// status asks all nodes.
func (f *fleet) status(ctx context.Context) (all clusterStatus, err error) {
	pods, err := f.pods(ctx)
	if err != nil {
		return all, err
	}
	all.Nodes = make([]nodeStatus, len(pods))
	together(len(pods), func(i int) {
		p := pods[i]
		all.Nodes[i] = nodeStatus{Node: p.Spec.NodeName, Pod: p.String(), Ready: p.Ready()}
		var s statusAnswer
		if err := f.ask(ctx, p, &s, "status"); err != nil {
			all.Nodes[i].Error = err.Error()
			return
		}
		all.Nodes[i].Status = &s.Status
	})
	all.Cluster = f.spread(ctx, pods)
	return all, nil
}

func printNodes(out io.Writer, all clusterStatus, form string) error {
	if form != "" {
		return printObject(out, all, form)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NODE\tPOD\tVERSION\tREADY\tPOOL\tFREE\tVOLUMES\tWORST")
	for _, n := range all.Nodes {
		cells := n.cells()
		for i := range cells {
			cells[i] = printable(cells[i])
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	wrong := slices.DeleteFunc(slices.Clone(all.Cluster), func(f health.Finding) bool { return f.State == health.StateGood })
	_, err := io.WriteString(out, findingLines(wrong))
	return err
}

// cells are the line of a node.
func (n nodeStatus) cells() []string {
	cells := []string{cmp.Or(n.Node, "-"), n.Pod, "-", cmp.Or(yes(n.Ready), "no"), "-", "-", "-"}
	if n.Status == nil {
		return append(cells, "no answer: "+n.Error)
	}
	p := n.Status.Plugin
	cells[2], cells[4], cells[5] = p.Version, size.Format(p.Pool.Size), size.Format(p.Pool.Available)
	cells[6] = strconv.Itoa(n.Status.Volumes)
	return append(cells, worst(n.Status.Findings))
}

// worst is the worst of what is wrong, and how much else there is.
func worst(findings []health.Finding) string {
	if len(findings) == 0 {
		return "-"
	}
	state := health.Worst(findings)
	w := findings[slices.IndexFunc(findings, func(f health.Finding) bool { return f.State == state })]
	what := fmt.Sprintf("%s %s", w.State, cmp.Or(w.Code, w.Requirement))
	if len(findings) > 1 {
		what += fmt.Sprintf(" (and %d more)", len(findings)-1)
	}
	return what + ": " + strings.ReplaceAll(w.Text, "\n", "; ")
}
