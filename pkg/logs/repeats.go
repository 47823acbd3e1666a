// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"cmp"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// Kubelet and the sidecars repeat a call that fails, at first within a second, later every two to
// five minutes. A line each minute shows that it still fails.
const defaultEvery = time.Minute

// defaultMost is far above the number of volumes that fail at one time on a node of 110 pods. A
// failure takes some hundred bytes.
const defaultMost = 1000

// Repeats keeps failures that repeat from flooding the log. Its zero value is usable.
type Repeats struct {
	Every time.Duration    // between two lines about the same; 0 is a minute
	Most  int              // how many objects are remembered; 0 is 1000
	Now   func() time.Time // monotonic; nil is time.Now

	mu      sync.Mutex
	failing map[string]*failing // by object
}

// failing is an object that has not succeeded since it failed.
type failing struct {
	last     time.Time
	failures int
	kinds    map[string]*kind
}

// kind is one way in which an object fails.
type kind struct {
	shown time.Time
	left  int
}

// Failed notes that an object failed, and reports whether to log it: the first failure of a kind,
// and then one in a minute. left is how many failures of that kind were not logged since the last
// line. With -v 4 every failure is logged.
//
// There must be few kinds. Of too many objects, those are forgotten that failed longest ago.
func (r *Repeats) Failed(object, of string) (show bool, left int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	f := r.failing[object]
	if f == nil {
		r.makeRoom()
		f = &failing{kinds: map[string]*kind{}}
		r.failing[object] = f
	}
	f.last = now
	f.failures++
	k := f.kinds[of]
	if k == nil {
		f.kinds[of] = &kind{shown: now}
		return true, 0
	}
	if klog.V(4).Enabled() {
		return true, 0
	}
	if now.Sub(k.shown) < cmp.Or(r.Every, defaultEvery) {
		k.left++
		return false, 0
	}
	left, k.left, k.shown = k.left, 0, now
	return true, left
}

// Succeeded notes that an object no longer fails, and returns how often it had failed.
func (r *Repeats) Succeeded(object string) (failures int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.failing[object]; f != nil {
		failures = f.failures
		delete(r.failing, object)
	}
	return failures
}

// makeRoom forgets the object that failed longest ago, if there are too many.
func (r *Repeats) makeRoom() {
	if r.failing == nil {
		r.failing = map[string]*failing{}
	}
	if len(r.failing) < cmp.Or(r.Most, defaultMost) {
		return
	}
	var oldest string
	var at time.Time
	for object, f := range r.failing {
		if oldest == "" || f.last.Before(at) {
			oldest, at = object, f.last
		}
	}
	delete(r.failing, oldest)
}

func (r *Repeats) now() time.Time {
	if r.Now != nil {
		return r.Now()
	}
	return time.Now()
}
