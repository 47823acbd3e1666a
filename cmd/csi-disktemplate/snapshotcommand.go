// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"

	"github.com/spf13/cobra"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func newSnapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "List the snapshots of a node, or describe some",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(snapshots.listCommand(), snapshots.describeCommand())
	return cmd
}

// snapshots are how snapshots are shown.
var snapshots = thing[admin.Snapshot]{
	one: "snapshot", many: "snapshots", names: "SNAPSHOT", example: "snapshot-4f0c",
	about: `SNAPSHOT is the id on this node, which a VolumeSnapshotContent has as its snapshotHandle.
ALLOCATED is what it takes of the pool, what it shares with others included.`,
	detail: `A snapshot is named by its id, or by the name that it was made with. Own bytes are free
when it goes; shared ones are those of other files too, for example of its source.`,
	list: func(n admin.Node) ([]admin.Snapshot, error) { return n.Snapshots() },
	more: func(n admin.Node, s admin.Snapshot) (admin.Snapshot, error) { return n.Snapshot(s.ID) },
	name: func(s admin.Snapshot) string { return s.ID },
	also: func(s admin.Snapshot) []string { return []string{s.Name} },
	hint: func(s admin.Snapshot) string { return "of volume " + s.Volume },
	columns: []column[admin.Snapshot]{
		{title: "SNAPSHOT", text: func(s admin.Snapshot) string { return s.ID }},
		{title: "VOLUME", text: func(s admin.Snapshot) string { return s.Volume }},
		{title: "FILESYSTEM", text: func(s admin.Snapshot) string { return s.Filesystem }},
		{title: "SIZE", text: func(s admin.Snapshot) string { return size.Format(s.Size) }},
		{title: "ALLOCATED", text: func(s admin.Snapshot) string { return size.Format(s.Allocated) }},
		{title: "AGE", text: func(s admin.Snapshot) string { return ageOf(s.Created) }},
		{title: "NAME", wide: true, text: func(s admin.Snapshot) string { return s.Name }},
		{title: "MODE", wide: true, text: func(s admin.Snapshot) string { return s.Mode }},
		{title: "UUID", wide: true, text: func(s admin.Snapshot) string { return s.UUID }},
	},
	fields: func(s admin.Snapshot) []field {
		return []field{
			{"Name", s.Name}, {"Volume", s.Volume}, {"Filesystem", s.Filesystem}, {"Size", size.Format(s.Size)},
			{"Mode", s.Mode}, {"UUID", cmp.Or(s.UUID, "-")}, {"Allocated", size.Format(s.Allocated)},
			{"  own", size.Format(*s.Own)}, {"  shared", size.Format(max(0, s.Allocated-*s.Own))},
			{"Created", sinceText(s.Created)},
		}
	},
}
