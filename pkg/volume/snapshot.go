// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// CreateSnapshot makes a snapshot of a claim, or finds it made. A snapshot that it returned
// survives a power cut, and the end of the claim.
//
// The filesystem in a snapshot has an identity of its own and an empty journal, so that it,
// and every copy of it, can be mounted beside the claim.
//
// A snapshot of a thin claim shares its extents, so the claim's next write to each takes new
// space. A thick claim must not need new space, so its snapshot is a copy, which takes
// longer.
//
// Errors are [errdefs.ErrNotFound] for a claim that does not exist, [errdefs.ErrExists] for
// a snapshot of another claim with the same name, [errdefs.ErrState], [errdefs.ErrBusy],
// [errdefs.ErrUnderWay] when ctx ends before the copy is made, [pool.ErrFull], or the
// kernel's.
func (m *Manager) CreateSnapshot(ctx context.Context, name, volumeID string) (image.SnapshotRecord, error) {
	id := SnapshotID(name)
	unlock, err := m.locks.snapshot(id)
	if err != nil {
		return image.SnapshotRecord{}, err
	}
	defer unlock()
	s, err := outlive(ctx, &m.work, "making snapshot "+id, func(ctx context.Context) (image.SnapshotRecord, error) {
		return m.createSnapshot(ctx, name, volumeID)
	})
	if err == nil { // another request may have started the work that this one joined
		err = compareSnapshot(s, name, volumeID)
	}
	return s, err
}

func (m *Manager) createSnapshot(ctx context.Context, name, volumeID string) (image.SnapshotRecord, error) {
	var none image.SnapshotRecord
	id := SnapshotID(name)
	if have, exists, err := m.existingSnapshot(name, volumeID); err != nil || exists {
		return have, err
	}
	vol, err := m.images.OpenClaim(volumeID)
	if err != nil {
		return none, err
	}
	defer vol.Close()
	if err := vol.CheckSource(); err != nil {
		return none, err
	}
	// Once the claim has overwritten everything, the snapshot has all of this to itself.
	allocated, err := copied(vol)
	if err != nil {
		return none, err
	}
	release, err := m.space.Admit(space.Demand{
		Key: image.SnapshotKey(id), Firm: allocated, Now: vol.Record.Provisioning.CopyCost(allocated, image.Thin),
	})
	if err != nil {
		return none, err
	}
	defer release()
	f, err := m.images.NewSnapshot()
	if err != nil {
		return none, err
	}
	defer f.Close()
	snap, err := m.fillSnapshot(ctx, f, vol, image.SnapshotRecord{
		ID: id, Name: name, Volume: volumeID, Spec: vol.Record.Spec, Mode: vol.Mode(), Created: time.Now().UTC(),
	})
	if err != nil {
		return none, pool.Full(fmt.Errorf("snapshot %s of volume %s: %w", id, volumeID, err))
	}
	if err := m.images.PublishSnapshot(snap); err != nil {
		return none, err
	}
	return snap.Record, nil
}

// existingSnapshot looks for the snapshot that a request asks for. If a power cut has taken
// its content, it removes the snapshot, and reports that there is none.
func (m *Manager) existingSnapshot(name, volumeID string) (have image.SnapshotRecord, exists bool, err error) {
	id := SnapshotID(name)
	snap, err := m.images.OpenSnapshot(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return have, false, nil
	}
	if err != nil {
		return have, false, err
	}
	defer snap.Close()
	if err := compareSnapshot(snap.Record, name, volumeID); err != nil {
		return have, false, err
	}
	fi, err := snap.File.Stat()
	if err != nil || fi.Size() > 0 {
		return snap.Record, err == nil, err
	}
	return have, false, m.images.RemoveSnapshot(id) // no call has returned it yet
}

// fillSnapshot gives an empty file a claim's content, an identity and its record.
func (m *Manager) fillSnapshot(ctx context.Context, f *os.File, vol *image.Image, r image.SnapshotRecord) (*image.Snapshot, error) {
	if err := m.copies.copyLive(ctx, vol, f, image.Thin); err != nil {
		return nil, err
	}
	if r.Mode == image.ModeFilesystem {
		r.UUID = uuid.New()
		if err := m.copies.newIdentity(f, r.Spec.Filesystem, r.UUID); err != nil {
			return nil, err
		}
	}
	return m.images.DescribeSnapshot(f, r)
}

// DeleteSnapshot removes a snapshot. One that does not exist is fine. Volumes that were made
// from it stay as they are.
func (m *Manager) DeleteSnapshot(id string) error {
	if err := image.CheckID(id); err != nil {
		if id == "" {
			return err
		}
		return nil // CSI 1.13, DeleteSnapshot: to delete a snapshot that was never made succeeds
	}
	unlock, err := m.locks.snapshot(id)
	if err != nil {
		return err
	}
	defer unlock()
	snap, err := m.images.OpenSnapshot(id) // only a file with a snapshot's record is removed
	if errors.Is(err, errdefs.ErrNotFound) {
		return m.space.CheckNotMaking(image.SnapshotKey(id))
	}
	if err != nil {
		return err
	}
	defer m.endings.file(snap.File)
	if err := m.pool.Check(); err != nil {
		return err
	}
	return m.images.RemoveSnapshot(id)
}

// GetSnapshot describes a snapshot. One that does not exist returns [errdefs.ErrNotFound].
func (m *Manager) GetSnapshot(id string) (image.SnapshotRecord, error) {
	return m.images.GetSnapshot(id)
}

// ListSnapshots lists snapshots as [Manager.ListClaims] lists claims. If volumeID is not
// empty, it lists those of this volume only.
func (m *Manager) ListSnapshots(volumeID, after string, limit int) ([]image.SnapshotRecord, string, error) {
	ids, err := m.pool.Snapshots()
	if err != nil {
		return nil, "", err
	}
	return page(ids, after, limit, &m.unread, func(id string) (image.SnapshotRecord, error) {
		s, err := m.GetSnapshot(id)
		if err == nil && volumeID != "" && s.Volume != volumeID {
			err = fmt.Errorf("%w: snapshot %s is of another volume", errdefs.ErrNotFound, id)
		}
		return s, err
	})
}
