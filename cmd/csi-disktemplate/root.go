// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

// newCommand returns the command csi-disktemplate. Without a subcommand it runs the plugin.
func newCommand() *cobra.Command {
	var o pluginOptions
	cmd := &cobra.Command{
		Use:   "csi-disktemplate",
		Short: "CSI node plugin: freshly formatted disks in milliseconds",
		Long: `csi-disktemplate gives pods freshly formatted disks in milliseconds.

Without a subcommand it runs the CSI node plugin. Each kind of disk is formatted
once, in a small VM, and kept as a template on a btrfs or xfs pool. Every volume is
a copy-on-write clone of its template with an identity of its own.`,
		Example: `  csi-disktemplate --pool /var/lib/csi-disktemplate --loopback-pool-size 20Gi --node-id "$(hostname)"
  csi-disktemplate format --fs xfs --size 1Gi -o disk.img`,
		Version:       versionLine(),
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { // of every subcommand too
			return refuse(cmd.Flags())
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runPlugin(cmd.Context(), o)
		},
	}
	cmd.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	o.add(cmd.Flags())
	addLogFlags(cmd.PersistentFlags())
	cmd.SetFlagErrorFunc(flagError)
	cmd.AddCommand(newFormatCommand(), newDoctorCommand(), newCleanAllCommand(), newGCCommand(), newTemplateCommand(), newGoldenCommand(), newVolumeCommand())
	cmd.AddCommand(newSnapshotCommand(), newContentCommand(), newWhyCommand(), newStatusCommand())
	completeFlags(cmd)
	return cmd
}
