// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package quota limits the inline volumes of a node, and counts them.
//
// Everybody who may create a pod may ask for any inline volume, and no quota of Kubernetes
// counts those. Claims are not counted here, because ResourceQuota counts them. A volume
// that exists already stays, and may be published again, whatever the limits are by then.
//
// The counts are kept in memory and added up as they change, because a publish has no time to
// read all records. The images stay the truth: they are read at the start, and again by each
// sweep.
package quota

import (
	"errors"
	"maps"
	"slices"
	"sync"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Ledger counts the inline volumes of a node.
//
// A volume is entered before its image is made, so that two publishes at once cannot both
// take the last place. It leaves after its image has gone.
type Ledger struct {
	pool   *pool.Pool
	images *image.Store
	limits Limits

	mu      sync.Mutex
	volumes map[string]entry  // by id
	node    tally             // of all volumes
	spaces  map[string]*tally // of the volumes of each namespace that has any
}

type entry struct {
	namespace string
	bytes     int64
	pending   bool // its image has no name yet
}

// New counts the volumes of a pool and returns its Ledger.
func New(p *pool.Pool, images *image.Store, limits Limits) (*Ledger, error) {
	l := newLedger(limits)
	l.pool, l.images = p, images
	return l, l.Recount()
}

func newLedger(limits Limits) *Ledger {
	return &Ledger{limits: limits, volumes: map[string]entry{}, spaces: map[string]*tally{}}
}

// CheckSize is [Limits.CheckSize].
func (l *Ledger) CheckSize(bytes int64) error { return l.limits.CheckSize(bytes) }

// Reserve enters a volume, or returns [errdefs.ErrLimit]. A volume that is entered already
// is not counted twice. release removes the volume again, unless it was settled meanwhile.
func (l *Ledger) Reserve(id, namespace string, bytes int64) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ofNamespace, ofNode := l.without(id, namespace)
	if err := l.limits.refuse(namespace, bytes, ofNamespace, ofNode); err != nil {
		return nil, err
	}
	l.set(id, entry{namespace, bytes, true})
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.volumes[id].pending {
			l.drop(id)
		}
	}, nil
}

// without is what a namespace and the node have without one volume.
func (l *Ledger) without(id, namespace string) (ofNamespace, ofNode usage) {
	var inNamespace tally
	if t := l.spaces[namespace]; t != nil {
		inNamespace = *t
	}
	node := l.node
	if e, entered := l.volumes[id]; entered {
		node.sub(e.bytes)
		if e.namespace == namespace {
			inNamespace.sub(e.bytes)
		}
	}
	return inNamespace.usage(), node.usage()
}

// set enters a volume, in place of what was entered for it. The ledger is locked.
func (l *Ledger) set(id string, e entry) {
	l.drop(id)
	l.volumes[id] = e
	l.node.add(e.bytes)
	if l.spaces[e.namespace] == nil {
		l.spaces[e.namespace] = &tally{}
	}
	l.spaces[e.namespace].add(e.bytes)
}

// drop removes a volume. The ledger is locked.
func (l *Ledger) drop(id string) {
	e, entered := l.volumes[id]
	if !entered {
		return
	}
	delete(l.volumes, id)
	l.node.sub(e.bytes)
	t := l.spaces[e.namespace]
	t.sub(e.bytes)
	if t.volumes == 0 {
		delete(l.spaces, e.namespace)
	}
}

// Settle is called once the volume's image has its name. The volume then stays until it is
// forgotten.
func (l *Ledger) Settle(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e, entered := l.volumes[id]; entered {
		e.pending = false
		l.volumes[id] = e
	}
}

// Forget is called once the volume's image has lost its name. For a claim it does nothing.
func (l *Ledger) Forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.drop(id)
}

func (l *Ledger) ids() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(maps.Keys(l.volumes))
}

// Recount makes the ledger agree with the pool: an administrator may have added or removed
// an image.
func (l *Ledger) Recount() error {
	ids, err := l.pool.Volumes()
	if err != nil {
		return err
	}
	for _, id := range append(ids, l.ids()...) {
		l.recount(id)
	}
	return nil
}

// recount looks at one volume. The ledger is locked while the record is read, some 7 µs, so
// that the volume cannot come or go in between: an image gets its name before it is settled,
// and loses it before it is forgotten.
func (l *Ledger) recount(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.volumes[id].pending {
		return
	}
	r, err := l.images.Get(id)
	if err != nil {
		if errors.Is(err, errdefs.ErrNotFound) {
			l.drop(id)
		} else {
			klog.ErrorS(err, "A volume cannot be read; its old count stays", "volume", id)
		}
		return
	}
	if r.Lifecycle == image.Inline {
		l.set(id, entry{namespace: r.Pod.Namespace, bytes: r.Spec.Size})
	} else {
		l.drop(id)
	}
}
