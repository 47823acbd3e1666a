// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"fmt"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// Counts are how many listed templates there are of each kind.
type Counts struct {
	There   int // built, or found
	Missing int // not tried yet
	Failing int // not built, or removed: they are tried again
}

// Counts counts the listed templates.
func (p *Prewarmer) Counts() Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Counts{
		There:   len(those(p.list, (*listed).there)),
		Missing: len(those(p.list, (*listed).untried)),
		Failing: len(those(p.list, (*listed).failing)),
	}
}

// Pending is the condition that listed templates are not there yet. It ends for good when each one was
// tried. There is none without [Config].Wait.
func (p *Prewarmer) Pending() []health.Condition {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := those(p.list, (*listed).untried)
	if !p.cfg.Wait || p.settled || len(left) == 0 {
		return nil
	}
	return []health.Condition{{
		Code: health.PrewarmPending, Severity: health.Degraded,
		Text:   fmt.Sprintf("%d of %d listed templates are not there yet: %s", len(left), len(p.list), names(left)),
		Remedy: "they are built one after the other; without --wait-for-prewarm the plugin is ready before",
	}}
}

// names lists the first few templates.
func names(list []*listed) string {
	const most = 5
	var names []string
	for _, l := range list[:min(len(list), most)] {
		names = append(names, l.spec.String())
	}
	text := strings.Join(names, ", ")
	if more := len(list) - most; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// Conditions are those that leave the plugin ready: the file cannot be read, a line of it is no spec, a
// listed template is not there. At most 20 of each are shown.
func (p *Prewarmer) Conditions() (found []health.Condition) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unread != nil {
		found = append(found, failed(p.cfg.File, fmt.Sprintf("--prewarm-file: %v", p.unread),
			"make it a readable file, or leave the flag out; what it listed before stays listed"))
	}
	for _, b := range p.bad[:min(len(p.bad), maxShown)] {
		found = append(found, failed(fmt.Sprintf("%s:%d", p.cfg.File, b.number),
			fmt.Sprintf("--prewarm-file: line %d of %s is left out: %v", b.number, p.cfg.File, b.err), ""))
	}
	failing := those(p.list, (*listed).failing)
	for _, l := range failing[:min(len(failing), maxShown)] {
		found = append(found, failed(l.spec.String(),
			fmt.Sprintf("template %s, which --prewarm or --prewarm-file lists, is not there: %v", l.spec, l.err),
			"the plugin tries again within the hour"))
	}
	return found
}

func failed(object, text, remedy string) health.Condition {
	return health.Condition{
		Code: health.PrewarmFailed, Object: object, Severity: health.Degraded, Text: text, Remedy: remedy, StillReady: true,
	}
}

// Requirements are that listed templates are there. The second one is for a plugin that waits for them before it is
// ready.
func (p *Prewarmer) Requirements() (listed, first health.Requirement) {
	listed = health.Requirement{Name: "prewarm", Look: p.Conditions, Good: func() string {
		c := p.Counts()
		return fmt.Sprintf("%d of %d listed templates are there, and none has failed", c.There, c.There+c.Missing+c.Failing)
	}}
	first = health.Requirement{Name: "first-prewarm", Look: p.Pending, Good: func() string { return "nothing waits for listed templates" }}
	return listed, first
}
