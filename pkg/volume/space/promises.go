// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package space

import (
	"errors"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// promise is the part of a volume's record that a budget needs.
type promise struct {
	claim        bool // false for an inline volume, or a file without a record
	provisioning image.Provisioning
	bytes        int64
}

// promises remembers what the records said. Reading a record takes 13 µs, and finding out
// that it has not changed takes 2 µs. Every change of an attribute moves the status change
// time.
type promises struct {
	before, now map[string]remembered // by volume id
}

type remembered struct {
	ino   uint64
	ctime syscall.Timespec
	promise
}

func (p promises) of(id string, st *syscall.Stat_t, read func(id string) (image.Record, error)) promise {
	r, ok := p.before[id]
	if !ok || r.ino != st.Ino || r.ctime != st.Ctim {
		r = remembered{ino: st.Ino, ctime: st.Ctim}
		record, err := read(id)
		switch {
		case err == nil:
			r.promise = promise{claim: true, provisioning: record.Provisioning, bytes: record.Spec.Size}
		case !errors.Is(err, errdefs.ErrNotFound):
			klog.ErrorS(err, "A volume's record cannot be read; it counts with the space that it takes", "volume", id)
		}
	}
	// A second change in the same tick of the kernel's clock would not be noticed.
	if time.Since(time.Unix(st.Ctim.Unix())) > clockTick {
		p.now[id] = r
	}
	return r.promise
}

// clockTick is longer than a tick of the kernel's coarse clock, which stamps files: 10 ms with
// CONFIG_HZ=100.
const clockTick = 50 * time.Millisecond

// recall returns the promises that the last survey has seen.
func (s *Space) recall() promises {
	s.mu.Lock()
	defer s.mu.Unlock()
	return promises{before: s.promises, now: make(map[string]remembered, len(s.promises))}
}

// remember keeps the promises that a survey has seen, and forgets deleted volumes.
func (s *Space) remember(p promises) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promises = p.now
}
