// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// CreateSnapshot keeps what a persistent volume holds at this moment, or finds
// that kept. What it returns survives a power cut, and the end of the volume.
//
// The filesystem in a snapshot has an identity of its own and an empty journal,
// so that it, and every copy of it, can be mounted beside the volume.
//
// A snapshot shares the volume's extents, so that the volume's next write to
// each takes new space. One of a thick volume is a copy instead, which takes
// longer, for a thick volume must not depend on what is left of the pool.
//
// Errors are ErrNotFound for the volume, ErrExists for a snapshot of that name of
// another volume, ErrState, [ErrUnderWay] when ctx ends before a copy does,
// [pool.ErrFull], or the kernel's.
func (m *Manager) CreateSnapshot(ctx context.Context, name, volumeID string) (Snapshot, error) {
	s, err := outlive(ctx, m, snapshotKey(SnapshotID(name)), func(ctx context.Context) (Snapshot, error) {
		return m.createSnapshot(ctx, name, volumeID)
	})
	if err == nil { // what was joined may have been asked for otherwise
		err = s.same(name, volumeID)
	}
	return s, err
}

// same reports how a request differs from the snapshot that has its id.
func (have Snapshot) same(name, volumeID string) error {
	var diff differences
	diff.add("name", have.Name, name)
	diff.add("source volume", have.Volume, volumeID)
	return diff.error("snapshot " + have.ID + "; use another name")
}

func (m *Manager) createSnapshot(ctx context.Context, name, volumeID string) (Snapshot, error) {
	id := SnapshotID(name)
	snap, err := m.openSnapshot(id)
	if err == nil {
		defer snap.Close()
		if err := snap.same(name, volumeID); err != nil {
			return Snapshot{}, err
		}
		fi, err := snap.Stat()
		if err != nil || fi.Size() > 0 {
			return snap.Snapshot, err
		}
		// A power cut took its content before anybody was told of it, as of a claim.
		if err := m.unlinkSnapshot(id); err != nil {
			return Snapshot{}, err
		}
	} else if !errors.Is(err, ErrNotFound) {
		return Snapshot{}, err
	}
	vol, err := m.openClaim(volumeID)
	if err != nil {
		return Snapshot{}, err
	}
	defer vol.Close()
	if err := vol.whole(); err != nil {
		return Snapshot{}, err
	}
	// What it comes to take of its own, once the volume has written all of it anew.
	bytes, err := allocated(vol.File)
	if err != nil {
		return Snapshot{}, err
	}
	d := demand{key: snapshotKey(id), firm: bytes}
	if vol.Thick { // its own copy, and as much for what the volume writes meanwhile
		d.now = 2 * bytes
	}
	release, err := m.admit(d)
	if err != nil {
		return Snapshot{}, err
	}
	defer release()
	f, err := m.pool.NewSnapshot()
	if err != nil {
		return Snapshot{}, err
	}
	defer f.Close()
	s := Snapshot{
		Version: recordVersion, ID: id, Name: name, Volume: volumeID, Spec: vol.Spec, Mode: vol.Mode, Created: time.Now().UTC(),
	}
	if err := m.fillSnapshot(ctx, f, &s, vol); err != nil {
		return Snapshot{}, pool.Full(fmt.Errorf("snapshot %s of volume %s: %w", id, volumeID, err))
	}
	err = tmpfile.Publish(f, m.pool.Snapshot(id))
	if err != nil && !errors.Is(err, os.ErrExist) { // that would be another's
		err = errors.Join(err, m.unlinkSnapshot(id))
	}
	if err != nil {
		return Snapshot{}, pool.Full(err)
	}
	return s, nil
}

func (m *Manager) fillSnapshot(ctx context.Context, f *os.File, s *Snapshot, vol *image) error {
	if err := m.takeSnapshot(ctx, f, vol); err != nil {
		return err
	}
	if s.Mode == ModeFilesystem {
		s.UUID = uuid.New()
		if err := m.newIdentity(f, s.Spec.Filesystem, s.UUID); err != nil {
			return err
		}
	}
	return pool.SetRecord(f, pool.VolumeAttr, s)
}

func (m *Manager) takeSnapshot(ctx context.Context, f *os.File, vol *image) error {
	if !vol.Thick {
		return m.cloneLive(ctx, vol, f)
	}
	return m.copyLive(ctx, vol, func(still *os.File) error { return copyAll(ctx, f, still) })
}

// allocated is what a file takes of the pool, in bytes, what it shares included.
func allocated(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

// DeleteSnapshot removes a snapshot. One that does not exist is fine. Volumes
// that were made of it stay whole.
func (m *Manager) DeleteSnapshot(id string) error {
	if err := CheckID(id); err != nil {
		if id == "" {
			return err
		}
		return nil // CSI 1.13, DeleteSnapshot: what was never made is gone
	}
	snap, err := m.openSnapshot(id) // nothing but ours is removed
	if errors.Is(err, ErrNotFound) {
		return m.space.notMaking(snapshotKey(id))
	}
	if err != nil {
		return err
	}
	defer snap.Close()
	if err := m.pool.Check(); err != nil {
		return err
	}
	return m.unlinkSnapshot(id)
}

func (m *Manager) unlinkSnapshot(id string) error {
	path := m.pool.Snapshot(id)
	if err := tmpfile.Remove(path); err != nil {
		return err
	}
	return tmpfile.SyncDir(filepath.Dir(path))
}

// GetSnapshot describes a snapshot. It is ErrNotFound if there is none.
func (m *Manager) GetSnapshot(id string) (Snapshot, error) {
	if err := CheckID(id); err != nil {
		return Snapshot{}, err
	}
	s, err := m.openSnapshot(id)
	if err != nil {
		return Snapshot{}, err
	}
	defer s.Close()
	return s.Snapshot, nil
}

// Snapshots lists the snapshots, of one volume if volumeID is not empty, like
// [Manager.Claims].
func (m *Manager) Snapshots(volumeID, after string, limit int) ([]Snapshot, string, error) {
	ids, err := m.pool.Snapshots()
	if err != nil {
		return nil, "", err
	}
	return page(ids, after, limit, func(id string) (Snapshot, error) {
		s, err := m.GetSnapshot(id)
		if err == nil && volumeID != "" && s.Volume != volumeID {
			err = fmt.Errorf("%w: it is of another volume", ErrNotFound)
		}
		return s, err
	})
}
