// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// newCommand is `csi-disktemplate`: without a subcommand it runs the plugin.
func newCommand() *cobra.Command {
	var o pluginOptions
	cmd := &cobra.Command{
		Use:   "csi-disktemplate",
		Short: "CSI node plugin: freshly formatted disks in milliseconds",
		Long: `csi-disktemplate gives pods freshly formatted disks in milliseconds.

Without a subcommand it runs the CSI node plugin. Each kind of disk is formatted
once, in a small VM, and kept as a template on a btrfs or xfs pool; every volume is
a copy-on-write clone of its template with an identity of its own.`,
		Example: `  csi-disktemplate --pool /var/lib/csi-disktemplate --node-id "$(hostname)"
  csi-disktemplate --pool /var/lib/csi-disktemplate --loopback-pool-size 20Gi --node-id node1
  csi-disktemplate format --fs xfs --size 1Gi -o disk.img`,
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runPlugin(cmd.Context(), o)
		},
	}
	o.add(cmd.Flags())
	addLogFlags(cmd.PersistentFlags())
	cmd.AddCommand(newFormatCommand(), newCleanAllCommand(), newGCCommand())
	return cmd
}

// addLogFlags offers what users of klog know, and no more.
func addLogFlags(f *pflag.FlagSet) {
	var all flag.FlagSet
	klog.InitFlags(&all)
	for _, name := range []string{"v", "vmodule"} {
		f.AddGoFlag(all.Lookup(name))
	}
}

// poolFlags say where the pool is.
type poolFlags struct{ dir, loopback string }

func (p *poolFlags) add(f *pflag.FlagSet) {
	f.StringVar(&p.dir, "pool", "", "directory for templates and volumes, on btrfs or xfs; made if missing (required)")
	f.StringVar(&p.loopback, "loopback-pool-size", "", "where --pool cannot share extents (ext4): size of an xfs to make in a sparse file there, as 20Gi; an existing one is used as it is")
}

func (p *poolFlags) config() (pool.Config, error) {
	c := pool.Config{Dir: p.dir}
	if p.loopback == "" {
		return c, nil
	}
	var err error
	if c.LoopbackSize, err = size.Parse(p.loopback); err != nil {
		return c, fmt.Errorf("--loopback-pool-size: %w", err)
	}
	if c.LoopbackSize <= 0 {
		return c, fmt.Errorf("--loopback-pool-size %q: must be more than 0", p.loopback)
	}
	return c, nil
}

// pluginOptions are the flags of the plugin.
type pluginOptions struct {
	endpoint, nodeID, driverName string
	kubeletDir, registrationDir  string
	httpEndpoint                 string
	maxVMs, maxBuildsPerHour     int
	templateCache                string
	maxVolumes                   int64
	headroom                     string
	overcommit                   float64
	sharedResizer                bool
	sweepInterval                time.Duration
	inline                       inlineFlags
	pool                         poolFlags
	vm                           vmFlags
}

func (o *pluginOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.endpoint, "endpoint", cmp.Or(os.Getenv("CSI_ENDPOINT"), "unix:///csi/csi.sock"), "where to serve CSI; the environment's CSI_ENDPOINT is the default if set")
	f.StringVar(&o.nodeID, "node-id", os.Getenv("NODE_NAME"), "name of this node, also its topology segment; the environment's NODE_NAME is the default (required)")
	f.StringVar(&o.driverName, "driver-name", driver.DefaultName, "name of the driver, as in CSIDriver and in pods")
	addKubeletDir(f, &o.kubeletDir)
	f.StringVar(&o.registrationDir, "registration-dir", "", "kubelet's plugins_registry, to register the driver there; --endpoint must have the same path for kubelet (default: left to a node-driver-registrar)")
	f.StringVar(&o.httpEndpoint, "http-endpoint", "", "address for /healthz, /readyz and /metrics, as :9808 (default: not served)")
	f.IntVar(&o.maxVMs, "max-formatting-vms", template.DefaultMaxBuilds, "how many templates are built at the same time; each takes a processor and about 310 MiB of memory")
	f.IntVar(&o.maxBuildsPerHour, "max-template-builds-per-hour", template.DefaultBuildsPerHour, "how many templates may be built within an hour; 0 is no limit")
	f.StringVar(&o.templateCache, "template-cache", "20%", "space of the pool that templates may take, a quantity or a percentage; the least recently used go first; 0 is no limit")
	f.Int64Var(&o.maxVolumes, "max-volumes-per-node", 1024, "how many claims the scheduler may place on this node; 0 is no limit")
	f.DurationVar(&o.sweepInterval, "sweep-interval", 10*time.Minute, "time between sweeps of what crashes and lost calls have left behind, after the one at start; 0 is no sweeps at all; see the command gc")
	f.BoolVar(&o.sharedResizer, "shared-resizer", false, "one external-resizer serves all nodes: what it asks of a volume that is not on this node is left to that volume's node, and is no error")
	f.StringVar(&o.headroom, "headroom", "5%", "space of the pool that new volumes leave free: a quantity, as 10Gi, or a percentage")
	f.Float64Var(&o.overcommit, "overcommit", 1, "how many times its size the pool promises to thin claims; with 1 each of them could be filled")
	o.inline.add(f)
	o.pool.add(f)
	o.vm.add(f)
}

func addKubeletDir(f *pflag.FlagSet, dir *string) {
	f.StringVar(dir, "kubelet-dir", "/var/lib/kubelet", "kubelet's root directory; nothing outside of it is ever mounted or unmounted")
}

// inlineFlags bound what pods may ask for by inline volumes.
type inlineFlags struct {
	size, bytes, bytesPerNamespace string
	volumes, volumesPerNamespace   int
}

// The defaults are far beyond what pods ask for that mean well: kubelet runs 110 of them
// unless it is told otherwise, and a template of 100 GiB is made as fast as one of 1 GiB,
// which cannot be said of some TiB.
func (i *inlineFlags) add(f *pflag.FlagSet) {
	f.StringVar(&i.size, "max-inline-size", "100Gi", "size that an inline volume may have; 0 is no limit")
	f.IntVar(&i.volumes, "max-inline-volumes", 500, "how many inline volumes there may be on this node; 0 is no limit")
	f.IntVar(&i.volumesPerNamespace, "max-inline-volumes-per-namespace", 0, "how many of them pods of one namespace may have; 0 is no limit")
	f.StringVar(&i.bytes, "max-inline-bytes", "0", "sum of the sizes of the inline volumes on this node, as 1Ti; 0 is no limit")
	f.StringVar(&i.bytesPerNamespace, "max-inline-bytes-per-namespace", "0", "sum of the sizes of those that pods of one namespace have; 0 is no limit")
}

func (i *inlineFlags) limits() (volume.Limits, error) {
	l := volume.Limits{Volumes: i.volumes, VolumesPerNamespace: i.volumesPerNamespace}
	for _, n := range []struct {
		flag  string
		value int
	}{{"--max-inline-volumes", i.volumes}, {"--max-inline-volumes-per-namespace", i.volumesPerNamespace}} {
		if n.value < 0 {
			return l, fmt.Errorf("%s %d: must not be negative; 0 is no limit", n.flag, n.value)
		}
	}
	for _, q := range []struct {
		flag, value string
		to          *int64
	}{{"--max-inline-size", i.size, &l.Size}, {"--max-inline-bytes", i.bytes, &l.Bytes}, {"--max-inline-bytes-per-namespace", i.bytesPerNamespace, &l.BytesPerNamespace}} {
		var err error
		if *q.to, err = size.Parse(q.value); err != nil {
			return l, fmt.Errorf("%s: %w", q.flag, err)
		}
		if *q.to < 0 {
			return l, fmt.Errorf("%s %q: must not be negative; 0 is no limit", q.flag, q.value)
		}
	}
	return l, nil
}

// validate checks what no part of the plugin checks itself.
func (o *pluginOptions) validate() error {
	if o.maxVMs < 1 {
		return fmt.Errorf("--max-formatting-vms %d: must be at least 1", o.maxVMs)
	}
	if !(o.overcommit >= 1) {
		return fmt.Errorf("--overcommit %g: must be at least 1", o.overcommit)
	}
	if _, err := size.ParseShare(o.headroom); err != nil {
		return fmt.Errorf("--headroom: %w", err)
	}
	if o.maxBuildsPerHour < 0 {
		return fmt.Errorf("--max-template-builds-per-hour %d: must not be negative; 0 is no limit", o.maxBuildsPerHour)
	}
	if _, err := size.ParseShare(o.templateCache); err != nil {
		return fmt.Errorf("--template-cache: %w", err)
	}
	_, err := o.inline.limits()
	return err
}

func newCleanAllCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "clean-all --pool DIR",
		Short: "Remove every cached template that is not being built",
		Long: `Remove every cached template that is not being built.

Volumes are not touched: they keep what they cloned. A running plugin builds
templates again as they are asked for. Templates whose lock another process
holds are left.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			pl, err := pool.OpenExisting(dir)
			if err != nil {
				return err
			}
			defer pl.Close()
			removed, busy, err := template.NewStore(template.Config{Pool: pl}).CleanAll()
			fmt.Fprintf(cmd.OutOrStdout(), "%d templates removed, %d left because they are being built\n", removed, busy)
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "pool", "", "the plugin's pool directory (required)")
	return cmd
}
