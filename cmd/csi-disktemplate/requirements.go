// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/prewarm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// nodeRequirements are what the plugin needs of its node, in the order in which they are shown. The plugin itself and
// doctor have them. ofPool are those of the pool and its volumes.
func nodeRequirements(o pluginOptions, ofPool []health.Requirement, formatter *vmformat.Formatter) []health.Requirement {
	kubelet := []health.Requirement{place.Requirement(o.kubeletDir, os.Getenv("POD_NAME") != "")}
	if os.Getenv(restarted) != "" { // in the mount namespace of this command alone, nothing is shared
		kubelet = nil
	}
	registry := cmp.Or(o.registrationDir, filepath.Join(o.kubeletDir, "plugins_registry"))
	return slices.Concat(
		ofPool,
		kubelet,
		volume.NodeRequirements(),
		formatter.Requirements(),
		[]health.Requirement{driver.NameRequirement(registry, o.driverName, o.endpoint)},
	)
}

// poolRequirements are those of a pool that is there.
func poolRequirements(p *pool.Pool, volumes *volume.Manager) []health.Requirement {
	return slices.Concat(p.Requirements(), volumes.Requirements())
}

// workRequirements are what only the running plugin knows of: what pods do, and what its operator lists.
func workRequirements(volumes *volume.Manager, listed health.Requirement, b *builder, goldens health.Requirement) []health.Requirement {
	all := []health.Requirement{volumes.DiskRequirement(), listed}
	if b.list != nil {
		all = append(all, b.list.Requirement())
	}
	if goldens.Look != nil {
		all = append(all, goldens)
	}
	return all
}

// lookout looks at everything that the running plugin needs.
type lookout struct {
	requirements []health.Requirement
	// healthy returns the conditions that Probe knows, and ready also those that hold only while the plugin starts.
	healthy, ready conditionsFunc
	// try makes the trials that are older than an age.
	try func(age time.Duration)
}

// newLookout watches the requirements. The conditions of the late ones are logged by their own rooms.
func newLookout(requirements, late []health.Requirement) *lookout {
	requirements, try := health.Seldomly(requirements)
	healthy := watched(conditionsOf(requirements))
	return &lookout{
		requirements: slices.Concat(requirements, late),
		healthy:      healthy, ready: joined(healthy, stamped(conditionsOf(late))), try: try,
	}
}

// trialPatience is how long somebody who asks waits for a trial. A disk that hangs ends none.
const trialPatience = 5 * time.Second

// findings describes how well each requirement of the running plugin is met: for pages, and whoever else shows all.
func (l *lookout) findings() []health.Finding {
	tried := make(chan struct{})
	go func() {
		l.try(youngTrial)
		close(tried)
	}()
	select {
	case <-tried:
	case <-time.After(trialPatience):
	}
	return health.Findings(l.requirements, l.ready())
}

// wrong describes what is wrong with the running plugin, as it was seen last. A limitation of the node is nothing that a
// pod waits for.
func (l *lookout) wrong() []health.Finding { return health.Findings(nil, health.Acute(l.ready())) }

// lateRequirements are those that the plugin meets a while after it has started.
func lateRequirements(first health.Requirement, p *prewarm.Config, registration *driver.Registration) (late []health.Requirement) {
	if p.Wait {
		late = append(late, first)
	}
	if registration != nil {
		late = append(late, registration.Requirement())
	}
	return late
}
