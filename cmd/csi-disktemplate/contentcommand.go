// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func newContentCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "content",
		Short: "List what volumes of a node can be born with, or describe some of it",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(contents.listCommand(), contents.describeCommand())
	return cmd
}

// contents are how contents are shown.
var contents = thing[admin.Content]{
	one: "content", many: "contents", names: "CONTENT", example: "postgres",
	about: `It shows what the plugin's --contents lists. STATE is known, resolving (its digest is
being found out), or unavailable; describe says why. Without a plugin nobody knows that
list, and what is shown are the contents that templates were built with.`,
	detail: `A content is named as --contents names it.`,
	list:   func(n admin.Node) ([]admin.Content, error) { return n.Contents() },
	name:   func(c admin.Content) string { return c.Name },
	hint:   func(c admin.Content) string { return strings.TrimSpace(c.State + " " + c.Source) },
	columns: []column[admin.Content]{
		{title: "CONTENT", text: func(c admin.Content) string { return c.Name }},
		{title: "KIND", text: func(c admin.Content) string { return c.Kind }},
		{title: "SOURCE", text: func(c admin.Content) string { return c.Source }},
		{title: "STATE", text: func(c admin.Content) string { return c.State }},
		{title: "NAMESPACES", text: func(c admin.Content) string { return strings.Join(c.Namespaces, ",") }},
		{title: "SIZE", text: contentSize},
		{title: "TEMPLATES", text: func(c admin.Content) string { return strconv.Itoa(len(c.Templates)) }},
		{title: "DIGEST", wide: true, text: func(c admin.Content) string { return c.Digest }},
		{title: "REASON", wide: true, text: func(c admin.Content) string { return c.Reason }},
	},
	fields: func(c admin.Content) []field {
		return []field{
			{"Kind", cmp.Or(c.Kind, "-")}, {"Source", cmp.Or(c.Source, "-")}, {"Digest", cmp.Or(c.Digest, "-")},
			{"State", cmp.Or(c.State, "-")}, {"  reason", cmp.Or(c.Reason, "-")},
			{"Namespaces", cmp.Or(strings.Join(c.Namespaces, ", "), "-")}, {"Size", cmp.Or(contentSize(c), "-")},
			{"Templates", lines(c.Templates)},
		}
	},
}

// contentSize is the size of a volume that asks for none.
func contentSize(c admin.Content) string {
	if c.Size == 0 {
		return ""
	}
	return size.Format(c.Size)
}
