// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// ratePeriod is the period in which builds are counted. An hour suits a limit on the processor
// time of something that takes a few seconds.
const ratePeriod = time.Hour

// rate bounds the number of builds that begin within any hour. It counts the builds of this
// process only. That is enough, since a pod cannot restart the plugin to reset the count.
type rate struct {
	most int              // 0 means no limit
	now  func() time.Time // monotonic

	mu    sync.Mutex
	begun []time.Time // within the last hour, in order
}

// turn is one build's place in a rate.
type turn struct {
	rate *rate
	at   time.Time
	used bool // the build began
}

// take reserves a turn. If there is none left, it returns [ErrTooMany], which says when to try
// again.
func (r *rate) take() (*turn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := &turn{rate: r, at: r.now()}
	if r.most == 0 {
		return t, nil
	}
	r.begun = slices.DeleteFunc(r.begun, func(at time.Time) bool { return t.at.Sub(at) >= ratePeriod })
	if len(r.begun) >= r.most {
		wait := ratePeriod - t.at.Sub(r.begun[0])
		return nil, fmt.Errorf("%w: --max-template-builds-per-hour %d is reached; try again in %s, ask for a disk of a kind (filesystem, size, label, options) that this node has already, or have the flag raised",
			ErrTooMany, r.most, wait.Truncate(time.Second)+time.Second)
	}
	r.begun = append(r.begun, t.at)
	return t, nil
}

// end returns the turn if it was not used.
func (t *turn) end() {
	if t.used {
		return
	}
	t.rate.mu.Lock()
	defer t.rate.mu.Unlock()
	if i := slices.Index(t.rate.begun, t.at); i >= 0 {
		t.rate.begun = slices.Delete(t.rate.begun, i, i+1)
	}
}
