// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// outcomes are what became of volumes with commitTo. The zero value is that of a start.
type outcomes struct {
	mu     sync.Mutex
	counts map[Outcome]int64
	failed []failure
}

// Outcome is what became of a volume with commitTo.
type Outcome string

// The outcomes.
const (
	Committed  Outcome = "committed"
	Unmarked   Outcome = "unmarked"   // its pod had not asked for the commit
	Superseded Outcome = "superseded" // later ones to the same golden came before its turn
	Refused    Outcome = "refused"    // by limits, rights, or for want of space
	Failed     Outcome = "failed"
)

// Outcomes are all of them.
var Outcomes = []Outcome{Committed, Unmarked, Superseded, Refused, Failed}

// failure is a commit that failed, until one to the same golden succeeds.
type failure struct {
	of   golden.Name
	text string
	at   time.Time
}

// mostFailures is how many failures are shown, the latest ones: whoever may create pods can make commits fail.
const mostFailures = 20

// shown is how long a failure is shown, if nobody commits to the golden again.
const shown = 24 * time.Hour

// committed notes that a golden has a new generation.
func (o *outcomes) committed(of golden.Name) {
	o.count(Committed)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = slices.DeleteFunc(o.failed, func(f failure) bool { return f.of == of })
}

func (o *outcomes) count(is Outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.counts == nil {
		o.counts = map[Outcome]int64{}
	}
	o.counts[is]++
}

// all counts each outcome, from 0.
func (o *outcomes) all() map[Outcome]int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	counts := map[Outcome]int64{}
	for _, is := range Outcomes {
		counts[is] = o.counts[is]
	}
	return counts
}

// not notes and logs why a volume was not committed.
func (o *outcomes) not(r image.Record, err error) {
	if errors.Is(err, errUnmarked) {
		o.count(Unmarked)
		klog.V(2).InfoS("A volume is not committed, since its pod has not asked for it", "volume", r.ID, "commitTo", r.CommitTo, "by", by(r), "reason", err)
		return
	}
	outcome := Failed
	if errors.Is(err, errdefs.ErrLimit) || errors.Is(err, pool.ErrFull) || errors.Is(err, errdefs.ErrInvalid) {
		outcome = Refused
	}
	o.count(outcome)
	logs.Warn("A volume is not committed; its golden stays as it is", "err", err, "volume", r.ID, "commitTo", r.CommitTo, "by", by(r))
	s, _ := golden.Target(r.Lineage, "")
	of := s.Golden(r.Pod.Namespace)
	text := fmt.Sprintf("golden %s stays as it is: volume %s of %s is not committed: %v", of, r.ID, by(r), err)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = slices.DeleteFunc(o.failed, func(f failure) bool { return f.of == of })
	o.failed = append(o.failed, failure{of, text, time.Now()})
	o.failed = o.failed[max(0, len(o.failed)-mostFailures):]
}

func (o *outcomes) conditions() (found []health.Condition) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = slices.DeleteFunc(o.failed, func(f failure) bool { return time.Since(f.at) > shown })
	for _, f := range o.failed {
		found = append(found, health.Condition{
			Code: health.GoldenFailed, Object: f.of.String(), Severity: health.Degraded, Text: f.text, StillReady: true,
		})
	}
	return found
}

// by names who made a generation.
func by(r image.Record) string {
	if r.Lifecycle == image.Claim {
		return "claim " + r.Name + " of " + r.Pod.Namespace
	}
	return "pod " + r.Pod.Namespace + "/" + r.Pod.Name
}
