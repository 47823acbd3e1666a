// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"fmt"
	"time"

	"golang.org/x/time/rate"
)

// ratePeriod is the period in which builds are counted. An hour suits a limit on the processor
// time of something that takes a few seconds.
const ratePeriod = time.Hour

// pace bounds the number of builds that begin. It is a token bucket: it has room for the builds
// of an hour, starts full and is refilled evenly. So a new node may build all that it needs at
// once, and when the bucket is empty the next build waits for its share of the hour only.
// Within any hour there are at most twice as many builds, and within many hours as many as there
// may be in each.
//
// It counts the builds of this process only. That is enough, since a pod cannot restart the
// plugin to fill the bucket.
type pace struct {
	most   int // in an hour; 0 means no limit
	bucket *rate.Limiter
	now    func() time.Time // monotonic
}

func newPace(most int) pace {
	limit := rate.Inf
	if most > 0 {
		limit = rate.Limit(float64(most) / ratePeriod.Seconds())
	}
	return pace{most: most, bucket: rate.NewLimiter(limit, most), now: time.Now}
}

// turn is the right to begin one build.
type turn struct {
	pace *pace // nil: the build does not count
	used bool  // the build began
}

// take takes a turn. If there is none, it returns [ErrTooMany], which says when to try again.
func (p *pace) take() (*turn, error) {
	now := p.now()
	if p.bucket.AllowN(now, 1) {
		return &turn{pace: p}, nil
	}
	missing := max(0, 1-p.bucket.TokensAt(now))
	wait := time.Duration(missing * float64(ratePeriod) / float64(p.most))
	return nil, fmt.Errorf("%w: --max-template-builds-per-hour %d is reached; try again in %s, ask for a disk of a kind (filesystem, size, label, options) that this node has already, or have the operator raise the flag",
		ErrTooMany, p.most, wait.Truncate(time.Second)+time.Second)
}

// end gives the turn back if it was not used.
func (t *turn) end() {
	if t.pace != nil && !t.used {
		// Taking -1 adds one, and never makes more than the bucket holds. A Reservation would
		// not do: it can be canceled only until its time has come, and this one's came at once.
		t.pace.bucket.AllowN(t.pace.now(), -1)
	}
}
