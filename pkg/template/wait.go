// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// answerAhead is how long before its deadline a caller gets its answer. At the deadline itself
// the caller is gone, and a pod's event would say "context deadline exceeded" and nothing else.
// Two seconds bring the answer back on a loaded node, and are little of the two minutes that
// kubelet and the sidecars wait.
const answerAhead = 2 * time.Second

// patience returns how long a caller waits that has so much time left.
func patience(left time.Duration) time.Duration {
	if left < 2*answerAhead {
		return left / 2
	}
	return left - answerAhead
}

// patient returns a context that ends ahead of ctx.
func patient(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, patience(time.Until(deadline)))
}

// waiting is an [ErrBuilding]: what a caller waited for when its time ended.
type waiting struct{ what string }

func (w *waiting) Error() string { return w.what + "; Kubernetes will ask again" }
func (w *waiting) Unwrap() error { return ErrBuilding }

// waitsFor says what the build of key waits for at the moment.
func (s *Store) waitsFor(key string, spec diskfs.Spec) string {
	now := s.queue.look(key, time.Now())
	if now.stage == locking {
		// The build may have the lock by now: then the holder is this process.
		holders := s.cfg.Pool.LockHolders(key)
		if !strings.Contains(holders, fmt.Sprintf("pid=%d ", os.Getpid())) {
			return fmt.Sprintf("template %s is locked by %s", spec, holders)
		}
	}
	what := fmt.Sprintf("template %s is being built", spec)
	if now.ahead > 0 {
		what = fmt.Sprintf("template %s is queued behind %d build", spec, now.ahead)
		if now.ahead > 1 {
			what += "s"
		}
	}
	if s.cfg.Progress != nil {
		if progress := s.cfg.Progress(spec); progress != "" {
			return what + ": " + progress // which says more than the mean of other builds
		}
	}
	if now.left > 0 {
		what += fmt.Sprintf(" (about %d s)", (now.left+time.Second-1)/time.Second)
	}
	return what
}

// stage is how far a build has come.
type stage int

const (
	locking  stage = iota + 1 // another process may have the template's lock
	queued                    // as many builds are under way as may be
	building                  // it has a slot
)

// queue knows the builds of this process, for those who wait for one. It decides nothing: which
// build is next is up to the slots, which are handed out in the order of asking.
type queue struct {
	slots int

	mu     sync.Mutex
	builds map[string]*work // by key
	asked  int              // builds that asked for a slot
	took   time.Duration    // running mean of the builds that succeeded
	built  int              // how many these are
}

// work is one build.
type work struct {
	stage  stage
	number int       // in the order of asking for a slot
	since  time.Time // when it got its slot
}

// enter notes that the build of key has come to a stage.
func (q *queue) enter(key string, st stage) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := q.builds[key]
	if w == nil {
		w = &work{}
		q.builds[key] = w
	}
	w.stage = st
	switch st {
	case queued:
		q.asked++
		w.number = q.asked
	case building:
		w.since = time.Now()
	}
}

// leave forgets the build of key, which has ended.
func (q *queue) leave(key string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.builds, key)
}

// busy reports whether a build is under way, or waits.
func (q *queue) busy() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.builds) > 0
}

// count counts the builds under way, and those that wait for their turn or for another process.
func (q *queue) count() (underWay, waiting int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, w := range q.builds {
		if w.stage == building {
			underWay++
		} else {
			waiting++
		}
	}
	return underWay, waiting
}

// meanOf is how many builds the mean is of. It follows a node that gets busy within some builds.
const meanOf = 8

// note takes in how long a build took.
func (q *queue) note(took time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.built++
	q.took += (took - q.took) / time.Duration(min(q.built, meanOf))
}

// look is what can be said of a build at one moment.
type look struct {
	stage stage
	ahead int           // builds that end or begin before it may begin
	left  time.Duration // until it is done; 0 if that is unknown
}

func (q *queue) look(key string, now time.Time) look {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := q.builds[key]
	if w == nil {
		return look{} // it begins or ends at this moment
	}
	l := look{stage: w.stage}
	if w.stage == building {
		if q.built > 0 {
			l.left = max(0, q.took-now.Sub(w.since))
		}
		return l
	}
	if w.stage == locking {
		return l
	}
	var free []time.Duration // until each build under way ends
	queuedAhead := 0
	for _, other := range q.builds {
		switch {
		case other.stage == building:
			free = append(free, max(0, q.took-now.Sub(other.since)))
		case other.stage == queued && other.number < w.number:
			queuedAhead++
		}
	}
	if l.ahead = len(free) + queuedAhead; l.ahead < q.slots {
		l.ahead = 0 // a slot is free, and this build is about to get it
	}
	if q.built > 0 {
		l.left = until(free, q.slots, queuedAhead, q.took)
	}
	return l
}

// until returns when a build is done that begins after others: free says when the slots in use
// get free, and each build takes the slot that is free first.
func until(free []time.Duration, slots, ahead int, took time.Duration) time.Duration {
	for len(free) < slots {
		free = append(free, 0)
	}
	for range ahead {
		slices.Sort(free)
		free[0] += took
	}
	return slices.Min(free) + took
}
