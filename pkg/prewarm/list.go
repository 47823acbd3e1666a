// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package prewarm

import (
	"errors"
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

const (
	// firstPause and lastPause bound the time until a template that is not there is tried again. A
	// pool that is full for a moment has room again within minutes. What fails for another reason
	// would fail each time, and each time starts a VM.
	firstPause = time.Minute
	lastPause  = time.Hour
)

// errGone is why a template that was there is tried again.
var errGone = errors.New("it was removed, by hand or to meet --template-cache")

// listed is a template that the operator lists, and what became of it.
type listed struct {
	spec  diskfs.Spec
	tries int
	err   error     // why it is not there; nil if it was there, or was not tried yet
	again time.Time // when to try again, if it is not there
}

// note takes in the outcome of a try.
func (l *listed) note(err error, now time.Time) {
	l.tries++
	l.miss(err, now)
}

// miss notes why the template is not there, or with nil that it is.
func (l *listed) miss(err error, now time.Time) {
	l.err, l.again = err, now.Add(pause(l.tries))
}

func (l *listed) untried() bool          { return l.tries == 0 }
func (l *listed) there() bool            { return l.tries > 0 && l.err == nil }
func (l *listed) failing() bool          { return l.err != nil }
func (l *listed) due(now time.Time) bool { return l.err != nil && !now.Before(l.again) }

// pause is how long to wait after so many tries. It doubles with each.
func pause(tries int) time.Duration {
	p := firstPause
	for ; tries > 1 && p < lastPause; tries-- {
		p *= 2
	}
	return min(p, lastPause)
}

// relist makes the list of some specs, each once. Of those that were listed before it keeps what became
// of them.
func relist(before []*listed, specs []diskfs.Spec) (list []*listed) {
	for _, spec := range specs {
		same := func(l *listed) bool { return l.spec.Equal(spec) }
		if slices.ContainsFunc(list, same) {
			continue
		}
		if i := slices.IndexFunc(before, same); i >= 0 {
			list = append(list, before[i])
			continue
		}
		list = append(list, &listed{spec: spec})
	}
	return list
}

// first returns the first one for which something holds, or nil.
func first(list []*listed, holds func(*listed) bool) *listed {
	if i := slices.IndexFunc(list, holds); i >= 0 {
		return list[i]
	}
	return nil
}

// those returns all for which something holds.
func those(list []*listed, holds func(*listed) bool) (found []*listed) {
	for _, l := range list {
		if holds(l) {
			found = append(found, l)
		}
	}
	return found
}
