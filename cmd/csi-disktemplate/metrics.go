// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/prewarm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// newRegistry returns a registry with the metrics of the process, the pool and the formatter.
func newRegistry(p *pool.Pool, formatter *vmformat.Formatter) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registerBuildInfo(r)
	registerPool(r, p)
	reportAccelerator(r, formatter)
	return r
}

// registerPool adds metrics of the pool's space.
func registerPool(r prometheus.Registerer, p *pool.Pool) { r.MustRegister(poolMetrics{p}) }

var (
	poolSize      = prometheus.NewDesc("csi_disktemplate_pool_size_bytes", "Size of the pool's filesystem; absent while the condition PoolUnusable holds.", nil, nil)
	poolAvailable = prometheus.NewDesc("csi_disktemplate_pool_available_bytes", "Space left on the pool's filesystem; absent while the condition PoolUnusable holds.", nil, nil)
)

// poolMetrics are the metrics of the pool's space. They are absent while the pool cannot be used:
// a number would be that of another filesystem, or of one that takes nothing. NaN would turn the
// sum over all nodes into NaN. The metric of conditions tells why they are absent, as "Writing
// exporters" in Prometheus' documentation has it for failed scrapes.
type poolMetrics struct{ pool *pool.Pool }

func (m poolMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- poolSize
	ch <- poolAvailable
}

func (m poolMetrics) Collect(ch chan<- prometheus.Metric) {
	if m.pool.Check() != nil {
		return
	}
	s, err := m.pool.Space()
	if err != nil {
		return
	}
	ch <- prometheus.MustNewConstMetric(poolSize, prometheus.GaugeValue, float64(s.Total))
	ch <- prometheus.MustNewConstMetric(poolAvailable, prometheus.GaugeValue, float64(s.Available))
}

var conditionDesc = prometheus.NewDesc("csi_disktemplate_condition", "1 while the condition holds, 0 while it does not; /readyz?verbose says why.", []string{"code"}, nil)

// conditionMetric looks at the conditions whenever it is read.
type conditionMetric conditionsFunc

func (look conditionMetric) Describe(ch chan<- *prometheus.Desc) { ch <- conditionDesc }

func (look conditionMetric) Collect(ch chan<- prometheus.Metric) {
	holds := map[string]float64{}
	for _, code := range health.Codes {
		holds[code] = 0
	}
	for _, c := range look() {
		holds[c.Code] = 1
	}
	for code, value := range holds {
		ch <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, value, code)
	}
}

var prewarmDesc = prometheus.NewDesc("csi_disktemplate_prewarm_templates",
	"Templates that --prewarm and --prewarm-file list, by state: there, missing or failing.", []string{"state"}, nil)

// prewarmMetric counts the listed templates whenever it is read.
type prewarmMetric func() prewarm.Counts

func (count prewarmMetric) Describe(ch chan<- *prometheus.Desc) { ch <- prewarmDesc }

func (count prewarmMetric) Collect(ch chan<- prometheus.Metric) {
	c := count()
	for state, n := range map[string]int{"there": c.There, "missing": c.Missing, "failing": c.Failing} {
		ch <- prometheus.MustNewConstMetric(prewarmDesc, prometheus.GaugeValue, float64(n), state)
	}
}

// reportAccelerator adds the accelerator of the formatting VM as a metric.
func reportAccelerator(r prometheus.Registerer, formatter *vmformat.Formatter) {
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "csi_disktemplate_formatter_accelerator_info",
		Help: "1 for the accelerator that the formatting VM runs on.",
	}, []string{"accelerator"})
	r.MustRegister(info)
	accel, _, err := formatter.Accelerator()
	if err != nil {
		return // a condition of the formatter says so
	}
	info.WithLabelValues(string(accel)).Set(1)
}

// registerEnding adds the count of what was deleted and still takes space.
func registerEnding(r prometheus.Registerer, count func() int) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "csi_disktemplate_volumes_ending",
		Help: "Deleted volumes and snapshots that still take space.",
	}, func() float64 { return float64(count()) }))
}

var (
	warmReady  = prometheus.NewDesc("csi_disktemplate_warm_volumes", "Volumes that are kept ready.", []string{"filesystem", "form"}, nil)
	warmLevel  = prometheus.NewDesc("csi_disktemplate_warm_level", "How many volumes are to be kept ready.", []string{"filesystem", "form"}, nil)
	warmOldest = prometheus.NewDesc("csi_disktemplate_warm_oldest_timestamp_seconds", "When the oldest volume that is kept ready was made; absent if there is none.", nil, nil)
	warmTaken  = prometheus.NewDesc("csi_disktemplate_warm_taken_total", "New volumes that could have been ready, by whether one was.", []string{"form", "result"}, nil)
)

// warmMetrics are the metrics of the volumes that are kept ready.
type warmMetrics struct{ volumes *volume.Manager }

func (m warmMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{warmReady, warmLevel, warmOldest, warmTaken} {
		ch <- d
	}
}

func (m warmMetrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	shelves, taken := m.volumes.Warm()
	type labels struct{ filesystem, form string }
	ready, level := map[labels]int{}, map[labels]int{}
	var oldest time.Time
	for _, s := range shelves {
		l := labels{s.Spec.Filesystem, string(s.Kind.Form)}
		ready[l] += s.Ready
		level[l] += s.Level
		if s.Ready > 0 && (oldest.IsZero() || s.Oldest.Before(oldest)) {
			oldest = s.Oldest
		}
	}
	for l := range level {
		gauge(warmReady, float64(ready[l]), l.filesystem, l.form)
		gauge(warmLevel, float64(level[l]), l.filesystem, l.form)
	}
	if !oldest.IsZero() {
		gauge(warmOldest, float64(oldest.Unix()))
	}
	for form, n := range taken {
		ch <- prometheus.MustNewConstMetric(warmTaken, prometheus.CounterValue, float64(n.Hits), string(form), "hit")
		ch <- prometheus.MustNewConstMetric(warmTaken, prometheus.CounterValue, float64(n.Misses), string(form), "miss")
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

var (
	contentDone = prometheus.NewDesc("csi_disktemplate_content_unpacked_bytes",
		"Bytes that VMs have unpacked of the archives that they unpack at the moment; 0 while there are none.", nil, nil)
	contentTotal = prometheus.NewDesc("csi_disktemplate_content_archive_bytes",
		"Bytes of the archives that VMs unpack at the moment.", nil, nil)
)

// contentMetrics say how far the contents are that are being unpacked.
type contentMetrics struct{ builder *builder }

func (m contentMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- contentDone
	ch <- contentTotal
}

func (m contentMetrics) Collect(ch chan<- prometheus.Metric) {
	done, total := m.builder.unpacked()
	ch <- prometheus.MustNewConstMetric(contentDone, prometheus.GaugeValue, float64(done))
	ch <- prometheus.MustNewConstMetric(contentTotal, prometheus.GaugeValue, float64(total))
}
