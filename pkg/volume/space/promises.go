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

// promise is what a budget wants to know of a volume's record.
type promise struct {
	claim        bool // otherwise an inline volume, or no volume of ours
	provisioning image.Provisioning
	bytes        int64
}

// promises remembers what the records said. To read one takes 13 µs, to see that it has not
// changed 2. The status change time tells: every change of an attribute moves it.
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
			klog.ErrorS(err, "Counting a volume by the space it takes, as its record cannot be read", "volume", id)
		}
	}
	// A change in the same tick of the kernel's clock would go unseen.
	if time.Since(time.Unix(st.Ctim.Unix())) > clockTick {
		p.now[id] = r
	}
	return r.promise
}

// clockTick is more than the kernel's coarse clock, which stamps files, ever lags: 10 ms
// with CONFIG_HZ=100.
const clockTick = 50 * time.Millisecond

// recall returns what an earlier survey has seen.
func (s *Space) recall() promises {
	s.mu.Lock()
	defer s.mu.Unlock()
	return promises{before: s.promises, now: make(map[string]remembered, len(s.promises))}
}

// remember keeps what a survey has seen, and forgets what exists no more.
func (s *Space) remember(p promises) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.promises = p.now
}
