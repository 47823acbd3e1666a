// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// ratePeriod is what builds are counted within. An hour is what people think of when
// they bound the processor time that goes into something of a few seconds.
const ratePeriod = time.Hour

// rate lets no more than so many builds begin within any hour. It knows those of this
// process: a pod cannot restart the plugin to be given more.
type rate struct {
	most int              // 0 is no limit
	now  func() time.Time // monotonic

	mu    sync.Mutex
	begun []time.Time // within the last hour, in order
}

// turn is one build's part of a rate.
type turn struct {
	rate *rate
	at   time.Time
	used bool // the build began
}

// take reserves a turn, or is [ErrTooMany], and says when to ask again.
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
		return nil, fmt.Errorf("%w: --max-template-builds-per-hour %d: so many were begun within the last hour; try again in %s, ask for a disk of a kind (filesystem, size, label, options) that this node has, or have the flag raised",
			ErrTooMany, r.most, wait.Truncate(time.Second)+time.Second)
	}
	r.begun = append(r.begun, t.at)
	return t, nil
}

// end gives the turn back, if it was not used.
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
