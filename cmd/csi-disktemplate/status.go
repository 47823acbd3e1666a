// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func newStatusCommand() *cobra.Command {
	var at whose
	var form string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the plugin of this node: its version, its pool, and what is wrong",
		Long: `Show the plugin of this node: its version, its pool, how many volumes there are, and what
is wrong. It asks the running plugin, which looks at itself every few seconds; doctor looks
anew, and at more. kubectl disktemplate status shows all nodes.`,
		Example: `  csi-disktemplate status
  csi-disktemplate status -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return at.ask(cmd, func(n admin.Node) error { return printStatus(cmd.OutOrStdout(), n, form) })
		},
	}
	addExistingPool(cmd.Flags(), &at.pool)
	addValueP(cmd.Flags(), &form, "output", "o", "", objectForm, "form of the answer (default: a text)")
	return cmd
}

func printStatus(out io.Writer, n admin.Node, form string) error {
	if n.Status == nil {
		return errors.New("no plugin runs on this pool: start it; `csi-disktemplate doctor` says what it needs")
	}
	s, err := n.Status()
	if err != nil {
		return err
	}
	if form != "" {
		return printObject(out, s, form)
	}
	if err := printFields(out, s.Plugin.Node, statusFields(s)); err != nil {
		return err
	}
	_, err = io.WriteString(out, findingLines(s.Findings))
	return err
}

func statusFields(s admin.Status) []field {
	p := s.Plugin
	return []field{
		{"Version", p.Version}, {"Driver", p.Driver}, {"Started", sinceText(p.Since)},
		{"Accelerator", cmp.Or(p.Accelerator, "-")}, {"Pool", p.Pool.Path}, {"  kind", p.Pool.Kind},
		{"  free", fmt.Sprintf("%s of %s", size.Format(p.Pool.Available), size.Format(p.Pool.Size))},
		{"Volumes", strconv.Itoa(s.Volumes)}, {"  ending", strconv.Itoa(p.Ending)},
	}
}
