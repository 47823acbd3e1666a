// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// order is one file to format.
type order struct {
	ctx      context.Context
	file     *os.File
	spec     diskfs.Spec
	job      guest.Job
	nonce    string
	fill     *Fill // nil: the filesystem stays empty
	progress func(guest.Progress)
	entered  time.Time   // the stage mkfs; written by the VM's console
	alone    bool        // its VM boots and does nothing else: an earlier one failed, or it has a fill
	again    bool        // it was in a VM before
	done     chan result // has room for one
}

type result struct {
	report Report
	err    error
}

// end hands the outcome to the caller of Format.
func (o *order) end(r Report, err error) { o.done <- result{r, err} }

// enter reports progress.
func (o *order) enter(p guest.Progress) {
	if p.Stage == guest.StageMkfs {
		o.entered = time.Now()
	}
	if o.progress != nil {
		o.progress(p)
	}
}

// reset makes an order ready for a VM of its own.
func (o *order) reset() error {
	o.alone, o.again = true, true
	return o.file.Truncate(0)
}

// maxBytes bounds the sizes of the disks that one VM formats, together. Up to that the time is
// that of a small disk: an ext4 of 1 TiB takes 5 s, and one of 8 TiB 34 s. A larger disk has a VM of
// its own.
const maxBytes = 1 << 40

// queue hands orders to VMs. While all VMs are busy orders gather, and the next VM takes as many
// as it may: a VM takes more time to start than to make most templates.
type queue struct {
	vms int // at most so many at once
	run func([]*order)

	mu      sync.Mutex
	waiting []*order // in the order of asking
	running int
}

// add queues an order. One whose caller gives up before its VM starts leaves the queue.
func (q *queue) add(o *order) {
	q.mu.Lock()
	q.waiting = append(q.waiting, o)
	q.dispatch()
	q.mu.Unlock()
}

// leave takes an order out of the queue, and reports whether it was still there.
func (q *queue) leave(o *order) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, w := range q.waiting {
		if w == o {
			q.waiting = append(q.waiting[:i:i], q.waiting[i+1:]...)
			return true
		}
	}
	return false
}

// dispatch starts VMs while there are orders and VMs free. q is locked.
func (q *queue) dispatch() {
	for q.running < q.vms && len(q.waiting) > 0 {
		var batch []*order
		batch, q.waiting = next(q.waiting, q.vms)
		q.running++
		go func() {
			q.run(batch)
			q.mu.Lock()
			defer q.mu.Unlock()
			q.running--
			q.dispatch()
		}()
	}
}

// next chooses the orders of the next VM: the first one, and others of its filesystem. It leaves some
// of these to the other VMs, unless those have the orders of other filesystems to do.
func next(waiting []*order, vms int) (batch, rest []*order) {
	first := waiting[0]
	alike := map[string]int{} // orders by filesystem
	for _, o := range waiting {
		if !o.alone {
			alike[o.spec.Filesystem]++
		}
	}
	share := min((alike[first.spec.Filesystem]*len(alike)+vms-1)/vms, guest.MaxJobs)
	bytes := int64(0)
	for i, o := range waiting {
		fits := !first.alone && !o.alone && o.spec.Filesystem == first.spec.Filesystem &&
			len(batch) < share && bytes+o.spec.Size <= maxBytes
		if i == 0 || fits {
			batch = append(batch, o)
			bytes += o.spec.Size
		} else {
			rest = append(rest, o)
		}
	}
	return batch, rest
}

// Load counts the VMs that run or are being prepared, and the files that wait for one.
func (f *Formatter) Load() (vms, waiting int) {
	f.queue.mu.Lock()
	defer f.queue.mu.Unlock()
	return f.queue.running, len(f.queue.waiting)
}
