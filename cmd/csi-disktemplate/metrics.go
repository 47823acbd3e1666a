// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// newRegistry returns a registry with the metrics of the process, the pool and the formatter.
func newRegistry(p *pool.Pool, formatter *vmformat.Formatter) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registerPool(r, p)
	reportAccelerator(r, formatter)
	return r
}

// registerPool adds metrics of the pool's space.
func registerPool(r prometheus.Registerer, p *pool.Pool) {
	gauge := func(name, help string, value func(pool.Space) int64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			s, err := p.Space()
			if err != nil {
				klog.ErrorS(err, "Cannot read the pool's space; its metrics are 0")
			}
			return float64(value(s))
		}))
	}
	gauge("csi_disktemplate_pool_size_bytes", "Size of the pool's filesystem.", func(s pool.Space) int64 { return s.Total })
	gauge("csi_disktemplate_pool_available_bytes", "Space left on the pool's filesystem.", func(s pool.Space) int64 { return s.Available })
}

// reportAccelerator logs the accelerator of the formatting VM, and adds it as a metric.
func reportAccelerator(r prometheus.Registerer, formatter *vmformat.Formatter) {
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "csi_disktemplate_formatter_accelerator_info",
		Help: "1 for the accelerator that the formatting VM runs on.",
	}, []string{"accelerator"})
	r.MustRegister(info)
	accel, whyNotKVM, err := formatter.Accelerator()
	if err != nil {
		klog.ErrorS(err, "No accelerator for the formatting VM")
		return
	}
	info.WithLabelValues(string(accel)).Set(1)
	if whyNotKVM != nil {
		klog.InfoS("Warning: formatting without KVM; a new template takes seconds longer", "accelerator", accel, "reason", whyNotKVM)
	}
}

// observeBuilds counts and times template builds.
func observeBuilds(r prometheus.Registerer) func(diskfs.Spec, time.Duration, error) {
	builds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "csi_disktemplate_template_build_duration_seconds",
		Help:    "Duration of template builds by filesystem and result.",
		Buckets: prometheus.ExponentialBuckets(0.5, 2, 9), // to 128 s, beyond the VM's deadline
	}, []string{"filesystem", "result"})
	r.MustRegister(builds)
	return func(spec diskfs.Spec, took time.Duration, err error) {
		result := "ok"
		if err != nil {
			result = "error"
		}
		builds.WithLabelValues(spec.Filesystem, result).Observe(took.Seconds())
	}
}

// observeTrims counts the templates that --template-cache has removed.
func observeTrims(r prometheus.Registerer) func(string, int64) {
	trims := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "csi_disktemplate_templates_trimmed_total",
		Help: "Templates removed because all of them took more than --template-cache.",
	})
	r.MustRegister(trims)
	return func(string, int64) { trims.Inc() }
}
