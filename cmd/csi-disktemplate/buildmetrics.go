// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/content"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// observeBuilds counts and times template builds, and counts why they fail.
func observeBuilds(r prometheus.Registerer) func(diskfs.Spec, time.Duration, error) {
	builds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "csi_disktemplate_template_build_duration_seconds",
		Help:    "Duration of template builds by filesystem and result.",
		Buckets: prometheus.ExponentialBuckets(0.5, 2, 9), // to 128 s, beyond the VM's deadline
	}, []string{"filesystem", "result"})
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "csi_disktemplate_template_build_failures_total",
		Help: "Template builds that failed, by the reason.",
	}, []string{"reason"})
	r.MustRegister(builds, failures)
	for _, name := range diskfs.Names() {
		builds.WithLabelValues(name, "ok") // from 0
		builds.WithLabelValues(name, "error")
	}
	for _, f := range failureReasons {
		failures.WithLabelValues(f.reason)
	}
	failures.WithLabelValues(otherReason)
	return func(spec diskfs.Spec, took time.Duration, err error) {
		result := "ok"
		if err != nil {
			result = "error"
			failures.WithLabelValues(failureReason(err)).Inc()
		}
		if errors.Is(err, template.ErrTooMany) { // it never began
			return
		}
		builds.WithLabelValues(spec.Filesystem, result).Observe(took.Seconds())
	}
}

// failureReasons are the reasons of failed builds. The first one that is in an error counts.
var failureReasons = []struct {
	is     error
	reason string
}{
	{context.Canceled, "stopped"},
	{pool.ErrFull, "pool_full"},
	{diskfs.ErrOutOfRange, "too_small"},
	{template.ErrNoFormatter, "no_formatter"},
	{template.ErrNoContent, "no_content"},
	{template.ErrChanged, "changed"},
	{template.ErrTooMany, "too_many"},
	{vmformat.ErrFormat, "vm"},
}

const otherReason = "other"

func failureReason(err error) string {
	for _, f := range failureReasons {
		if errors.Is(err, f.is) {
			return f.reason
		}
	}
	return otherReason
}

// observePhases times what the formatter does for a template, by the parts of its report.
func observePhases(r prometheus.Registerer) func(vmformat.Report) {
	phases := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "csi_disktemplate_template_build_phase_duration_seconds",
		Help: "Duration of the phases of template builds that succeeded, of those that share a VM each: " +
			"prepare, boot, disks, mkfs, unpack (a content), check (in the VM), host (the check and sync on the node).",
		Buckets: prometheus.ExponentialBuckets(0.01, 4, 8), // to 164 s
	}, []string{"phase"})
	r.MustRegister(phases)
	observe := func(phase string, took time.Duration) { phases.WithLabelValues(phase).Observe(took.Seconds()) }
	for _, phase := range []string{"prepare", "boot", "disks", "mkfs", "unpack", "check", "host"} {
		phases.WithLabelValues(phase) // from 0
	}
	return func(is vmformat.Report) {
		observe("prepare", is.Prepare)
		observe("boot", is.Boot)
		observe("disks", is.Disks)
		observe("mkfs", is.Make)
		if is.Unpack > 0 {
			observe("unpack", is.Unpack)
		}
		observe("check", is.Check)
		observe("host", is.Host)
	}
}

// registerTemplates adds the templates that there are, and those that are being built.
func registerTemplates(r prometheus.Registerer, store *template.Store, formatter *vmformat.Formatter) {
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		if n, bytes, err := store.Total(); err == nil {
			send("templates", float64(n))
			send("template_bytes", float64(bytes))
		}
		builds, queued := store.Load()
		vms, waiting := formatter.Load()
		waiting = min(waiting, builds) // the two were not looked at at once
		send("template_builds", float64(builds-waiting), "running")
		send("template_builds", float64(queued+waiting), "queued")
		send("formatter_vms", float64(vms))
	},
		[]string{"templates", "Templates in the pool."},
		[]string{"template_bytes", "Space that templates have allocated; volumes share it with them."},
		[]string{"template_builds", "Template builds under way, and those that wait for a VM, for their turn or for another process.", "state"},
		[]string{"formatter_vms", "Formatting VMs that run or are being prepared."}))
}

// registerContents counts the contents that --contents lists.
func registerContents(r prometheus.Registerer, b *builder) {
	r.MustRegister(newGauges(func(send func(string, float64, ...string)) {
		for state, n := range b.contentCounts() {
			send("contents", float64(n), string(state))
		}
	}, []string{"contents", "Contents that --contents lists, by state: known, resolving or failing.", "state"}))
}

// contentCounts counts the contents by their states, from 0.
func (b *builder) contentCounts() map[content.State]int {
	if b.list != nil {
		return b.list.Counts()
	}
	counts := map[content.State]int{}
	for _, s := range content.States {
		counts[s] = 0
	}
	return counts
}
