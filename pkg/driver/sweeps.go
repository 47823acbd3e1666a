// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// sweepMetrics are the metrics of sweeps.
type sweepMetrics struct {
	actions *prometheus.CounterVec
	sweeps  *prometheus.CounterVec
	last    prometheus.Gauge
	failed  prometheus.Gauge
	left    prometheus.Gauge
}

func newSweepMetrics(r prometheus.Registerer) sweepMetrics {
	m := sweepMetrics{
		actions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_disktemplate_sweep_actions_total",
			Help: "Objects that sweeps found, by the planned action (delete, detach, thaw, kill, commit, leave) and its result.",
		}, []string{"action", "result"}),
		sweeps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_disktemplate_sweeps_total",
			Help: "Sweeps by their result: ok, or error if the node could not be looked at.",
		}, []string{"result"}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "csi_disktemplate_sweep_last_timestamp_seconds",
			Help: "When the last sweep ended; 0 before the first.",
		}),
		failed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "csi_disktemplate_sweep_last_failed",
			Help: "1 if the last sweep failed, else 0.",
		}),
		left: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "csi_disktemplate_sweep_left",
			Help: "Objects that the last sweep left for somebody to look at, or failed to take away.",
		}),
	}
	r.MustRegister(m.actions, m.sweeps, m.last, m.failed, m.left)
	for verb, results := range sweepResults {
		for _, result := range results {
			m.actions.WithLabelValues(string(verb), result)
		}
	}
	m.sweeps.WithLabelValues("ok")
	m.sweeps.WithLabelValues("error")
	return m
}

// sweepResults are the results that [resultOf] returns.
var sweepResults = map[sweep.Verb][]string{
	sweep.Delete: {"done", "failed", "skipped"},
	sweep.Detach: {"done", "failed", "skipped"},
	sweep.Thaw:   {"done", "failed", "skipped"},
	sweep.Kill:   {"done", "failed", "skipped"},
	sweep.Commit: {"done", "failed", "skipped"},
	sweep.Leave:  {"left"},
}

// resultOf is the result of an action, as a label.
func resultOf(a sweep.Action) string {
	switch {
	case a.Failed():
		return "failed"
	case a.Result == sweep.Skipped:
		return "skipped"
	case a.Verb == sweep.Leave:
		return "left"
	}
	return "done"
}

// swept counts a sweep with its actions. One that the end of the plugin cut short counts only with these.
func (m sweepMetrics) swept(actions []sweep.Action, err error) {
	left := 0
	for _, a := range actions {
		result := resultOf(a)
		m.actions.WithLabelValues(string(a.Verb), result).Inc()
		if result == "failed" || result == "left" {
			left++
		}
	}
	if errors.Is(err, context.Canceled) {
		return
	}
	result, failed := "ok", 0.0
	if err != nil {
		result, failed = "error", 1
	}
	m.sweeps.WithLabelValues(result).Inc()
	m.last.SetToCurrentTime()
	m.failed.Set(failed)
	if err == nil {
		m.left.Set(float64(left))
	}
}
