// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// ErrLimit means that a namespace, or the node, has as much as its administrator
// allows.
var ErrLimit = errors.New("limit reached")

// Limits bound what inline volumes there may be: whoever may create a pod may ask for
// any, and no quota of Kubernetes counts them. Claims are not meant, which
// ResourceQuota counts. A volume that is there already stays, and may be published
// again, whatever the limits are by then.
//
// In each field 0 is no limit. Volumes and bytes are those of this node; bytes are
// sizes, whatever is written of them.
type Limits struct {
	Size                int64 // bytes of one volume
	Volumes             int
	VolumesPerNamespace int
	Bytes               int64
	BytesPerNamespace   int64
}

// checkSize is [diskfs.ErrOutOfRange] for an inline volume that is too large.
func (l Limits) checkSize(bytes int64) error {
	if l.Size == 0 || bytes <= l.Size {
		return nil
	}
	return fmt.Errorf("%w: volume attribute size: %s: an inline volume may have %s at most (--max-inline-size); ask for less, use a claim, or have the flag raised",
		diskfs.ErrOutOfRange, size.Format(bytes), size.Format(l.Size))
}

// usage is what inline volumes there are.
type usage struct {
	volumes int
	bytes   int64
}

// with adds a volume. Two thousand of the largest have more bytes than an int64 holds,
// and must not seem to have none.
func (u usage) with(bytes int64) usage {
	return usage{u.volumes + 1, min(u.bytes, math.MaxInt64-bytes) + bytes}
}

// refuse says why a volume is one too many for its namespace or the node, which have
// so much without it, or nil.
func (l Limits) refuse(namespace string, bytes int64, ofNamespace, ofNode usage) error {
	beyond := func(limit, sum int64) bool { return limit > 0 && sum > limit }
	switch ns, node := ofNamespace.with(bytes), ofNode.with(bytes); {
	case beyond(int64(l.VolumesPerNamespace), int64(ns.volumes)):
		return fmt.Errorf("%w: --max-inline-volumes-per-namespace %d: namespace %q has %d inline volumes on this node; delete pods of it that have some, or have the flag raised",
			ErrLimit, l.VolumesPerNamespace, namespace, ofNamespace.volumes)
	case beyond(l.BytesPerNamespace, ns.bytes):
		return fmt.Errorf("%w: --max-inline-bytes-per-namespace %s: namespace %q has %s in inline volumes on this node and asks for %s more; ask for less, delete pods of it that have some, or have the flag raised",
			ErrLimit, size.Format(l.BytesPerNamespace), namespace, size.Format(ofNamespace.bytes), size.Format(bytes))
	case beyond(int64(l.Volumes), int64(node.volumes)):
		return fmt.Errorf("%w: --max-inline-volumes %d: this node has %d inline volumes, %d of them of namespace %q; delete pods that have some, or have the flag raised",
			ErrLimit, l.Volumes, ofNode.volumes, ofNamespace.volumes, namespace)
	case beyond(l.Bytes, node.bytes):
		return fmt.Errorf("%w: --max-inline-bytes %s: this node has %s in inline volumes, %s of it of namespace %q, which asks for %s more; ask for less, delete pods that have some, or have the flag raised",
			ErrLimit, size.Format(l.Bytes), size.Format(ofNode.bytes), size.Format(ofNamespace.bytes), namespace, size.Format(bytes))
	}
	return nil
}

// ledger has in mind which inline volumes there are, as a publish has no time to read
// all records. The images stay the truth: a Manager reads them when it starts, and
// recount whenever it is called.
//
// A volume is entered before its image is made, so that two at once do not both take
// the last place, and leaves after its image has gone.
type ledger struct {
	limits Limits

	mu      sync.Mutex
	volumes map[string]entry // by id
}

type entry struct {
	namespace string
	size      int64
	pending   bool // its image has no name yet
}

// reserve enters a volume, or is [ErrLimit]. One that is there already is not counted
// twice. release takes it back, unless it was settled meanwhile.
func (l *ledger) reserve(id, namespace string, size int64) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var ofNamespace, ofNode usage
	for other, e := range l.volumes {
		if other == id {
			continue
		}
		ofNode = ofNode.with(e.size)
		if e.namespace == namespace {
			ofNamespace = ofNamespace.with(e.size)
		}
	}
	if err := l.limits.refuse(namespace, size, ofNamespace, ofNode); err != nil {
		return nil, err
	}
	l.volumes[id] = entry{namespace, size, true}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.volumes[id].pending {
			delete(l.volumes, id)
		}
	}, nil
}

// settle is for a volume whose image has its name: it stays until it is forgotten.
func (l *ledger) settle(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.volumes[id]
	e.pending = false
	l.volumes[id] = e
}

// forget is for a volume whose image has lost its name. Others than inline volumes are
// not known here, and need not be.
func (l *ledger) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.volumes, id)
}

func (l *ledger) ids() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(maps.Keys(l.volumes))
}

// recount brings the ledger in line with the pool: somebody may have put an image there,
// or taken one away, by hand.
func (m *Manager) recount() error {
	ids, err := m.pool.Volumes()
	if err != nil {
		return err
	}
	for _, id := range append(ids, m.ledger.ids()...) {
		m.recountOne(id)
	}
	return nil
}

// recountOne does so for one volume. The ledger is locked while its record is read, some
// 13 µs, so that nothing can happen to the one without the other: an image gets its
// name before it is settled, and loses it before it is forgotten.
func (m *Manager) recountOne(id string) {
	l := &m.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.volumes[id].pending {
		return
	}
	img, err := m.open(id)
	if err != nil {
		if errors.Is(err, ErrNotFound) {
			delete(l.volumes, id)
		} else {
			klog.ErrorS(err, "Not counting anew a volume that cannot be read", "volume", id)
		}
		return
	}
	defer img.Close()
	if img.Lifecycle == Ephemeral {
		l.volumes[id] = entry{namespace: img.Pod.Namespace, size: img.Spec.Size}
	} else {
		delete(l.volumes, id)
	}
}
