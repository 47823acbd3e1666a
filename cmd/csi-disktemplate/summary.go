// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// logStart logs what the plugin begins to work with, in one line. What cannot be read is left out
// of it: a condition says what is wrong.
func logStart(o pluginOptions, p *pool.Pool, formatter *vmformat.Formatter) {
	pairs := []any{"version", versionName(), "node", o.nodeID}
	pairs = append(pairs, poolPairs(p)...)
	for _, images := range []struct {
		kind string
		list func() ([]string, error)
	}{{"volumes", p.Volumes}, {"snapshots", p.Snapshots}, {"templates", p.Templates}} {
		if names, err := images.list(); err == nil {
			pairs = append(pairs, images.kind, len(names))
		}
	}
	pairs = append(pairs, "defaultDurability", o.durability)
	if accel, _, err := formatter.Accelerator(); err == nil {
		pairs = append(pairs, "accelerator", accel)
	}
	klog.InfoS("Started", pairs...)
}

// poolPairs describe the pool, from the top layer down.
func poolPairs(p *pool.Pool) []any {
	pairs := []any{"pool", p.Root(), "kind", p.Kind()}
	if s, err := p.Space(); err == nil {
		pairs = append(pairs, "size", size.Format(s.Total), "free", size.Format(s.Available))
	}
	if bounded, err := p.CanBound(); err == nil {
		pairs = append(pairs, "diskImagesBounded", bounded)
	}
	// The pool's own filesystem is the first; what is below it can be tighter.
	if layers, err := p.Layers(); err == nil && len(layers) > 1 {
		for _, l := range layers[1:] {
			pairs = append(pairs, "below", fmt.Sprintf("%s of %s, %s of %s free", l.Type.Name(), l.Path, size.Format(l.Available), size.Format(l.Total)))
		}
	}
	return pairs
}

// logStop logs why the plugin ends, and what it did and leaves. ctx has ended.
func logStop(ctx context.Context, started time.Time, metrics *driver.Metrics, volumes *volume.Manager) {
	pairs := []any{"reason", context.Cause(ctx), "uptime", time.Since(started).Round(time.Millisecond), "calls", metrics.Served()}
	if n, err := volumes.Mounted(); err == nil {
		pairs = append(pairs, "mountedVolumes", n)
	}
	klog.InfoS("Stopped; mounted volumes stay as they are", pairs...)
}
