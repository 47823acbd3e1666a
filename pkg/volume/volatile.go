// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"fmt"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// durabilityOf is the durability that a new volume gets. The operator's default is for mounted
// filesystems: a disk.img has no loop device that could drop flushes.
func (m *Manager) durabilityOf(r InlineRequest) image.Durability {
	if r.Durability == "" && r.Mode == image.ModeFilesystem {
		return cmp.Or(m.durability, image.Synced)
	}
	return r.Durability
}

// losses remembers volatile volumes that were removed because the node has rebooted, until they
// are made again: that may take a VM, and further calls. The new volume's record says it from
// then on.
//
// Of a pod that is gone before, the volume stays here. There are no more of these than there
// were images at the boot.
type losses struct {
	mu   sync.Mutex
	made map[string]time.Time // by volume id
}

// note remembers a volume that was made at a time.
func (l *losses) note(id string, made time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.made == nil {
		l.made = map[string]time.Time{}
	}
	l.made[id] = made
}

// of returns when the volume was made that was removed, or the zero time.
func (l *losses) of(id string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.made[id]
}

// forget forgets a volume.
func (l *losses) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.made, id)
}

// lossConditions says that a volatile volume lost its content to a reboot, as long as the volume
// lives.
func lossConditions(r image.Record) []health.Condition {
	if r.Lost.IsZero() {
		return nil
	}
	return []health.Condition{{
		Code: "VolatileContentLost", Severity: health.DataLoss,
		Text: fmt.Sprintf("the node has rebooted since volatile volume %s was made at %s: the volume was made again, without what it held",
			r.ID, r.Lost.Format(time.RFC3339)),
		Remedy: "have the pod make its content again; what must outlive a reboot needs the attribute durability: synced, or a claim",
	}}
}
