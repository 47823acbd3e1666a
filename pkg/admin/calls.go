// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"slices"
	"sync"
	"time"
)

// Cause is why a call failed, as far as it decides what to do about it.
type Cause string

// The causes.
const (
	CauseTemplate  Cause = "template"  // a template is being built, or too many were
	CauseContent   Cause = "content"   // a content is not available
	CauseSpace     Cause = "space"     // the pool, or a layer below it, is full
	CauseLimit     Cause = "limit"     // of the operator
	CauseRequest   Cause = "request"   // what was asked for cannot be had, whenever it is asked for
	CauseElsewhere Cause = "elsewhere" // another node has what the volume is a copy of, or is to have the volume
	CauseBusy      Cause = "busy"      // another call works on the same volume, or goes on with the work
	CauseCondition Cause = "condition" // something is wrong with the plugin: a finding says what
	CauseNode      Cause = "node"      // something failed that should not
)

// Request is a CSI call.
type Request struct {
	Method   string    `json:"method"`
	Object   string    `json:"object,omitempty"` // id of the volume or snapshot, or the name of one that is to be made
	Pod      *Pod      `json:"pod,omitempty"`    // if the call tells it
	Began    time.Time `json:"began"`
	Duration float64   `json:"durationSeconds"` // up to now, if it is under way
	UnderWay bool      `json:"underWay,omitempty"`
	WaitsFor string    `json:"waitsFor,omitempty"` // at this moment
	Template string    `json:"template,omitempty"` // the key of the one that it waits for, or waited
	Code     string    `json:"code,omitempty"`     // of gRPC, once it has ended
	Cause    Cause     `json:"cause,omitempty"`    // if it failed
	Error    string    `json:"error,omitempty"`    // in full
}

// Requests are the calls of late.
type Requests struct {
	UnderWay []Request `json:"underWay"` // the oldest first
	Last     []Request `json:"last"`     // at most 50, the newest first
	// Failed has the last call of each object that failed and has not succeeded since: the newest first.
	Failed []Request `json:"failed"`
}

const (
	// keptCalls is how many calls are remembered that have ended.
	keptCalls = 50
	// keptFailures bounds the objects whose last failure is remembered: more than a node has pods.
	keptFailures = 500
	// failureLife is how long a failure counts that is not repeated. Kubelet tries again after 2 minutes
	// at the latest, and external-provisioner after 5.
	failureLife = 15 * time.Minute
	// maxName is more than CSI allows for an identifier, in bytes (CSI 1.13, "Size Limits").
	maxName = 256
)

// Calls remembers CSI calls. Its methods may be called at the same time. To begin and end a call takes
// some hundred nanoseconds (`-bench Calls ./pkg/admin`).
type Calls struct {
	mu       sync.Mutex
	underWay map[*Call]struct{}
	last     [keptCalls]*Call
	ended    int // how many have ended: the place of the next one
	failed   map[string]*Call
}

// NewCalls returns a Calls without calls.
func NewCalls() *Calls {
	return &Calls{underWay: map[*Call]struct{}{}, failed: map[string]*Call{}}
}

// Call is one call. The lock of its Calls guards it.
type Call struct {
	of    *Calls
	r     Request
	waits func() string // what it waits for at the moment; may be nil
}

// Begin notes a call that begins. pod may be nil. No name is kept that is too long to be one.
func (c *Calls) Begin(began time.Time, method, object string, pod *Pod) *Call {
	call := &Call{of: c, r: Request{Method: method, Object: short(object), Pod: pod, Began: began.UTC(), UnderWay: true}}
	c.mu.Lock()
	c.underWay[call] = struct{}{}
	c.mu.Unlock()
	return call
}

// short cuts what is too long for a name, which bounds the memory.
func short(name string) string {
	if len(name) <= maxName {
		return name
	}
	return string([]byte(name[:maxName]))
}

// Waits notes that the call waits for a template, and how to find out more; with nil, that it waits no longer.
func (c *Call) Waits(template string, what func() string) {
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	c.r.Template, c.waits = template, what
}

// Ended is how a call ended.
type Ended struct {
	Code  string // of gRPC
	Cause Cause  // if it failed
	Err   error  // nil if it succeeded
	Took  time.Duration
	// Quiet means that the call changes nothing and comes often. It is remembered only if it failed.
	Quiet bool
}

// End notes how the call ended.
func (c *Call) End(e Ended) {
	text := ""
	if e.Err != nil {
		text = e.Err.Error()
	}
	all := c.of
	all.mu.Lock()
	defer all.mu.Unlock()
	delete(all.underWay, c)
	c.r.UnderWay, c.r.Duration, c.waits = false, e.Took.Seconds(), nil
	c.r.Code, c.r.Cause, c.r.Error = e.Code, e.Cause, text
	if e.Err == nil && e.Quiet {
		return
	}
	all.last[all.ended%keptCalls] = c
	all.ended++
	if e.Quiet || c.r.Object == "" {
		return
	}
	if e.Err == nil {
		delete(all.failed, c.r.Object)
		return
	}
	all.makeRoom()
	all.failed[c.r.Object] = c
}

// makeRoom drops the oldest failure if there are too many.
func (c *Calls) makeRoom() {
	if len(c.failed) < keptFailures {
		return
	}
	var oldest *Call
	for _, call := range c.failed {
		if oldest == nil || call.r.Began.Before(oldest.r.Began) {
			oldest = call
		}
	}
	delete(c.failed, oldest.r.Object)
}

// List returns the calls of late. What those under way wait for is asked without a lock.
func (c *Calls) List() Requests {
	now := time.Now()
	all := Requests{UnderWay: []Request{}, Last: []Request{}, Failed: []Request{}}
	var waits []func() string
	c.mu.Lock()
	for call := range c.underWay {
		r := call.r
		r.Duration = now.Sub(r.Began).Seconds()
		all.UnderWay, waits = append(all.UnderWay, r), append(waits, call.waits)
	}
	for i := c.ended - 1; i >= max(0, c.ended-keptCalls); i-- {
		all.Last = append(all.Last, c.last[i%keptCalls].r)
	}
	for _, call := range c.failed {
		if now.Sub(call.r.Began) < failureLife {
			all.Failed = append(all.Failed, call.r)
		}
	}
	c.mu.Unlock()
	for i, what := range waits {
		if what != nil {
			all.UnderWay[i].WaitsFor = what()
		}
	}
	older := func(a, b Request) int { return a.Began.Compare(b.Began) }
	slices.SortFunc(all.UnderWay, older)
	slices.SortFunc(all.Failed, func(a, b Request) int { return older(b, a) })
	return all
}

// Of returns the calls that a condition holds for: those under way first, then those that have ended.
func (r Requests) Of(holds func(Request) bool) (found []Request) {
	for _, request := range slices.Concat(r.UnderWay, r.Last) {
		if holds(request) {
			found = append(found, request)
		}
	}
	return found
}
