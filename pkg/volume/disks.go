// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// disks remembers what is wrong with the disk.img files of pods.
type disks struct {
	mu     sync.Mutex
	wrong  []health.Condition
	failed logs.Repeats
}

// CheckDisks looks at each disk.img in the pool: whether its pod made it larger than its volume, or
// shorter than its claim, which [Manager.DiskHealth] then returns, and whether the kernel still
// bounds its space. It opens each disk.img: a pod that owns its file can take it out of its bound.
func (m *Manager) CheckDisks(ctx context.Context) error {
	ids, err := m.pool.Volumes()
	if err != nil {
		return err
	}
	var wrong []health.Condition
	for _, id := range ids {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		found, err := m.checkDisk(id)
		if err != nil {
			if show, left := m.disks.failed.Failed(id, "check"); show {
				logs.Warn("A disk.img cannot be looked at or bounded", "err", err, "volume", id, "notLogged", left)
			}
		}
		wrong = append(wrong, found...)
	}
	m.disks.mu.Lock()
	defer m.disks.mu.Unlock()
	m.disks.wrong = wrong
	return nil
}

// checkDisk returns what is wrong with a volume, if it is a disk.img that has another length than
// was meant.
func (m *Manager) checkDisk(id string) ([]health.Condition, error) {
	// An image that is deleted meanwhile is of no concern here. Other calls and the sweep
	// complain of one that cannot be read.
	if r, err := m.images.Get(id); err != nil || r.Mode != image.ModeDiskImage {
		return nil, nil
	}
	img, err := m.images.Open(id)
	if err != nil {
		return nil, nil
	}
	defer img.Close()
	found, err := diskConditions(img)
	if img.Record.Lifecycle == image.Inline { // one that is too short concerns its pod alone, and ends with it
		found = slices.DeleteFunc(found, func(c health.Condition) bool { return c.Code != health.DiskImageGrown })
	}
	for i := range found {
		// The other volumes work as long as the pool has space, and the next condition says if not.
		found[i].Object, found[i].StillReady = id, true
	}
	if lost, e := m.images.LostBound(img); e != nil || !lost {
		return found, errors.Join(err, e)
	}
	return found, errors.Join(err, m.boundAgain(id))
}

// boundAgain bounds a disk.img again, if no other operation works on the volume.
func (m *Manager) boundAgain(id string) error {
	unlock, err := m.locks.volume(id)
	if err != nil {
		return nil // the next look tries again
	}
	defer unlock()
	img, err := m.images.Open(id) // its record may have changed
	if err != nil {
		return nil
	}
	defer img.Close()
	return m.images.Bound(img)
}

// DiskHealth returns what [Manager.CheckDisks] found last: each disk.img that its pod made larger than
// its volume, or shorter than its claim.
func (m *Manager) DiskHealth() []health.Condition {
	m.disks.mu.Lock()
	defer m.disks.mu.Unlock()
	return slices.Clone(m.disks.wrong)
}
