// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

const (
	// lookInterval is the time between two looks at the file, and at what became of the templates.
	// Kubelet takes a minute or more to bring a changed ConfigMap to a node.
	lookInterval = 10 * time.Second
	// lately is how long ago a kind of disk may have been used whose template is built anew after an
	// upgrade. A week has each of what is done daily or weekly.
	lately = 7 * 24 * time.Hour
)

// Config configures a Prewarmer. Templates is required.
type Config struct {
	Templates *template.Store
	Specs     []diskfs.Spec // to build first, in this order
	File      string        // path of a list of more; "" means none
	Wait      bool          // the plugin is ready only when all that is listed was tried
}

// Prewarmer has templates built before anybody asks for them.
type Prewarmer struct {
	cfg      Config
	file     file                // used by Run alone
	outdated []template.Outdated // the same

	mu      sync.Mutex
	list    []*listed
	unread  error     // why File cannot be read
	bad     []badLine // of File
	settled bool      // each one that was listed has been tried
}

// New reads the file. Nothing is built before [Prewarmer.Run].
func New(c Config) *Prewarmer {
	p := &Prewarmer{cfg: c, file: file{File: watchedfile.File{Path: c.File}}}
	p.relist()
	p.look()
	return p
}

// Run builds templates until ctx ends.
func (p *Prewarmer) Run(ctx context.Context) {
	p.findOutdated()
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		for ctx.Err() == nil && p.step(ctx) {
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			p.findGone()
		}
	}
}

// findOutdated takes stock before anything is built, since a new template may push out an old one.
func (p *Prewarmer) findOutdated() {
	var err error
	if p.outdated, err = p.cfg.Templates.Outdated(time.Now().Add(-lately)); err != nil {
		logs.Warn("Templates of earlier formatters were not looked at; they are built when somebody asks", "err", err)
	}
	if len(p.outdated) > 0 {
		klog.InfoS("The formatter has changed; templates that were used lately are built anew", "templates", len(p.outdated))
	}
}

// step works on the next template. It returns false if there is none at the moment.
func (p *Prewarmer) step(ctx context.Context) bool {
	p.look()
	if l := first(p.list, (*listed).untried); l != nil {
		p.try(ctx, l)
		return true
	}
	p.settle()
	if len(p.outdated) > 0 {
		o := p.outdated[0]
		p.outdated = p.outdated[1:]
		p.renew(ctx, o)
		return true
	}
	now := time.Now()
	if l := first(p.list, func(l *listed) bool { return l.due(now) }); l != nil {
		p.try(ctx, l)
		return true
	}
	return false
}

// look takes in the file if it has changed.
func (p *Prewarmer) look() {
	changed, err := p.file.look()
	p.mu.Lock()
	p.unread = err
	p.mu.Unlock()
	if changed {
		klog.InfoS("Read the list of templates to prewarm", "file", p.cfg.File,
			"templates", len(p.file.specs), "badLines", len(p.file.bad))
		p.relist()
	}
}

// relist makes the list anew. Only Run changes the list, and reads it without the lock.
func (p *Prewarmer) relist() {
	list := relist(p.list, slices.Concat(p.cfg.Specs, p.file.specs))
	var specs []diskfs.Spec
	for _, l := range list {
		specs = append(specs, l.spec)
	}
	p.cfg.Templates.Retain(specs)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list, p.bad = list, p.file.bad
}

// try has a listed template, or notes why not.
func (p *Prewarmer) try(ctx context.Context, l *listed) {
	err := p.cfg.Templates.Prewarm(ctx, l.spec, time.Time{})
	if err != nil && ctx.Err() != nil {
		return // the plugin stops
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l.note(err, time.Now())
}

// renew has the template of a kind of disk that was used lately. Whoever asks for one that failed has it
// built.
func (p *Prewarmer) renew(ctx context.Context, o template.Outdated) {
	err := p.cfg.Templates.Prewarm(ctx, o.Spec, o.Used)
	if err == nil || ctx.Err() != nil {
		return
	}
	if errors.Is(err, template.ErrNoRoom) || errors.Is(err, template.ErrNoFormatter) || errors.Is(err, pool.ErrFull) {
		p.outdated = nil // the others would fail as well
	}
	logs.Warn("A template that was used lately was not built anew; it is built when somebody asks",
		"spec", o.Spec.String(), "err", err)
}

// findGone finds listed templates that were there and are not any more.
func (p *Prewarmer) findGone() {
	gone := those(p.list, func(l *listed) bool { return l.there() && !p.cfg.Templates.Has(l.spec) })
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range gone {
		l.miss(errGone, time.Now())
	}
}

// settle notes that each listed template was tried.
func (p *Prewarmer) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.settled {
		return
	}
	p.settled = true
	if len(p.list) > 0 {
		there, failing := those(p.list, (*listed).there), those(p.list, (*listed).failing)
		klog.InfoS("Each listed template was tried", "there", len(there), "failing", len(failing))
	}
}
