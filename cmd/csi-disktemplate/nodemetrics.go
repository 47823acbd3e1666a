// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"runtime"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
)

// registerBuildInfo adds which build this is.
func registerBuildInfo(r prometheus.Registerer) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name:        "csi_disktemplate_build_info",
		Help:        "1, with the version of the plugin and what it was built with.",
		ConstLabels: prometheus.Labels{"version": versionName(), "goversion": runtime.Version(), "goarch": runtime.GOARCH},
	}, func() float64 { return 1 }))
}

// registerReady adds whether the plugin is ready, as /readyz says it.
func registerReady(r prometheus.Registerer, look conditionsFunc) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "csi_disktemplate_ready",
		Help: "1 while the plugin is ready, else 0; the metric of conditions says why.",
	}, func() float64 {
		if len(health.Unready(look())) > 0 {
			return 0
		}
		return 1
	}))
}

// gauges are metrics that are looked up together. Collect sends them to a function, by their names, or nothing
// where a look failed: see [poolMetrics].
type gauges struct {
	descs map[string]*prometheus.Desc
	look  func(send func(name string, value float64, labels ...string))
}

// newGauges makes gauges of rows of a name, a help, and labels.
func newGauges(look func(send func(name string, value float64, labels ...string)), rows ...[]string) gauges {
	g := gauges{map[string]*prometheus.Desc{}, look}
	for _, row := range rows {
		g.descs[row[0]] = prometheus.NewDesc("csi_disktemplate_"+row[0], row[1], row[2:], nil)
	}
	return g
}

func (g gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range g.descs {
		ch <- d
	}
}

func (g gauges) Collect(ch chan<- prometheus.Metric) {
	g.look(func(name string, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(g.descs[name], prometheus.GaugeValue, value, labels...)
	})
}

// registerSpace adds the layers of the pool, and what the pool has promised.
func registerSpace(r prometheus.Registerer, p *pool.Pool, volumes *volume.Manager) {
	const of = " of a filesystem that the pool is on, from the pool's own (layer 0) down"
	labels := []string{"layer", "path", "filesystem", "shared"}
	row := func(name, help string) []string { return append([]string{name, help}, labels...) }
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		layers, err := p.Layers()
		if err != nil || p.Check() != nil {
			return
		}
		for i, l := range layers {
			labels := []string{strconv.Itoa(i), l.Path, l.Type.Name(), strconv.FormatBool(l.Shared)}
			send("pool_layer_size_bytes", float64(l.Total), labels...)
			send("pool_layer_available_bytes", float64(l.Available), labels...)
			send("pool_layer_headroom_bytes", float64(p.Headroom(l)), labels...)
		}
	},
		row("pool_layer_size_bytes", "Size"+of+"."),
		row("pool_layer_available_bytes", "Space left"+of+"."),
		row("pool_layer_headroom_bytes", "Space that new volumes leave to the node"+of+"; 0 where the node is not on it.")))
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		is, err := volumes.Promises()
		if err != nil {
			return
		}
		send("pool_headroom_bytes", float64(is.Headroom))
		send("pool_overcommit_ratio", is.Overcommit)
		send("pool_promised_bytes", float64(is.Thin), "thin")
		send("pool_promised_bytes", float64(is.Firm), "firm")
	},
		[]string{"pool_headroom_bytes", "Space of the pool that new volumes leave free."},
		[]string{"pool_overcommit_ratio", "How many times its size the pool promises to thin claims."},
		[]string{"pool_promised_bytes", "Space that was promised to thin claims, and firmly to thick claims and snapshots.", "kind"}))
}

// registerVolumes adds what there is on the node, and how much of its limits inline volumes take.
func registerVolumes(r prometheus.Registerer, volumes *volume.Manager, limits quota.Limits) {
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		c, err := volumes.Census()
		if err != nil {
			return
		}
		for class, n := range c.Volumes {
			send("volumes", float64(n), class.Lifecycle.String(), string(class.Mode))
		}
		send("snapshots", float64(c.Snapshots))
		send("loop_devices", float64(c.Loops))
		send("pool_allocated_bytes", float64(c.Allocated))
		send("pool_shared_bytes", float64(c.Saved))
	},
		[]string{"volumes", "Volumes in the pool. Up to a minute old.", "lifecycle", "mode"},
		[]string{"snapshots", "Snapshots in the pool. Up to a minute old."},
		[]string{"loop_devices", "Loop devices of volumes, also of those that are kept ready or about to end. Up to a minute old."},
		[]string{"pool_allocated_bytes", "Space that all images have allocated; extents that several of them share count several times. Up to a minute old."},
		[]string{"pool_shared_bytes", "Space that sharing extents saves, at least. Up to a minute old."}))
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		n, bytes := volumes.Inline()
		send("inline_volumes", float64(n))
		send("inline_volumes_limit", limit(int64(limits.Volumes)))
		send("inline_bytes", float64(bytes))
		send("inline_bytes_limit", limit(limits.Bytes))
	},
		[]string{"inline_volumes", "Inline volumes on the node."},
		[]string{"inline_volumes_limit", "How many there may be; +Inf without a limit."},
		[]string{"inline_bytes", "Sum of the sizes of the inline volumes on the node."},
		[]string{"inline_bytes_limit", "How large it may be; +Inf without a limit."}))
}

// limit is the value of a limit of which 0 means none: a share of no limit is 0.
func limit(n int64) float64 {
	if n == 0 {
		return math.Inf(1)
	}
	return float64(n)
}
