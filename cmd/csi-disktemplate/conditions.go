// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
)

// lookInterval is the time between two looks at the conditions. With it the log says when
// something happened, and not when somebody asked: kubelet probes every 10 s, and Prometheus
// scrapes every 15 s or more. A look takes 0.2 ms, nearly all of it for the formatter's programs.
const lookInterval = 5 * time.Second

// conditionsFunc returns the conditions that hold now, in a slice of its own.
type conditionsFunc = func() []health.Condition

// youngTrial is the age up to which a trial of the pool and of a loop device counts for whoever asks for all findings. A
// person asks, or a program for one, and a trial writes a few blocks and takes 3 ms.
const youngTrial = 5 * time.Second

// conditionsOf is [health.Look] at the requirements.
func conditionsOf(requirements []health.Requirement) conditionsFunc {
	return func() []health.Condition { return health.Look(requirements) }
}

// watched joins the conditions of several parts, fills in since when each one holds, and logs
// when it begins and ends.
func watched(parts ...conditionsFunc) conditionsFunc {
	w := &health.Watch{Find: joined(parts...), Began: logBegan, Ended: logEnded}
	return w.Look
}

// stamped is [watched] for parts that log by themselves.
func stamped(parts ...conditionsFunc) conditionsFunc {
	w := &health.Watch{Find: joined(parts...)}
	return w.Look
}

// joined returns the conditions of several parts, one part after the other.
func joined(parts ...conditionsFunc) conditionsFunc {
	return func() (found []health.Condition) {
		for _, part := range parts {
			found = append(found, part()...)
		}
		return found
	}
}

// keepLooking looks at each tick until ctx ends.
func keepLooking(ctx context.Context, look func(), tick <-chan time.Time) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
			look()
		}
	}
}

// lookEach is [keepLooking] with a clock.
func lookEach(ctx context.Context, interval time.Duration, look func()) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	keepLooking(ctx, look, tick.C)
	return nil
}

func logBegan(c health.Condition) {
	pairs := append(named(c), "reason", c.Message())
	if c.Severity == health.Limited { // it was so yesterday, and is nothing that happened
		klog.InfoS("The node has a limitation", pairs...)
		return
	}
	if c.StillReady {
		logs.Warn("A condition began; the plugin is ready all the same", pairs...)
		return
	}
	klog.ErrorS(nil, "A condition began; the plugin is not ready", pairs...)
}

func logEnded(c health.Condition, lasted time.Duration) {
	klog.InfoS("A condition ended", append(named(c), "since", c.Since.UTC().Format(time.RFC3339), "lasted", lasted.Round(time.Millisecond))...)
}

// named returns the keys and values that tell a condition from others.
func named(c health.Condition) []any {
	pairs := []any{"condition", c.Code}
	if c.Object != "" {
		pairs = append(pairs, "object", c.Object)
	}
	return pairs
}
