// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Store has the images of a pool.
type Store struct {
	pool      *pool.Pool
	removed   atomic.Int64
	volumes   records[Record]
	snapshots records[SnapshotRecord]
	watch     func(key string) (changed func())
}

// Watch has watch called before a claim or a snapshot gets its name, loses it, or gets another
// size, and what it returns afterwards, however that went. All such changes go through the Store.
// An inline volume is told of only when it is removed. Watch is called before the Store is used.
func (s *Store) Watch(watch func(key string) (changed func())) { s.watch = watch }

// changing tells the watcher of a change that begins.
func (s *Store) changing(key string) (changed func()) {
	if s.watch == nil {
		return func() {}
	}
	return s.watch(key)
}

// NewStore returns the Store of a pool.
func NewStore(p *pool.Pool) *Store {
	return &Store{
		pool:      p,
		volumes:   records[Record]{kind: "volume", stat: p.StatVolume, read: p.ReadVolume, known: map[string]remembered[Record]{}},
		snapshots: records[SnapshotRecord]{kind: "snapshot", stat: p.StatSnapshot, read: p.ReadSnapshot, known: map[string]remembered[SnapshotRecord]{}},
	}
}

// Open opens the image of a volume, or returns [errdefs.ErrNotFound].
func (s *Store) Open(id string) (*Image, error) { return open(id, s.pool.OpenVolume) }

func open(id string, file func(id string) (*os.File, error)) (*Image, error) {
	img := &Image{}
	var err error
	if img.File, err = openFile("volume", id, file, &img.Record); err != nil {
		return nil, err
	}
	if err := checkRecord(img.Path(), id, img.Record.ID, img.Record.Version); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

// OpenClaim opens the image of a claim. An inline volume returns [errdefs.ErrNotFound].
func (s *Store) OpenClaim(id string) (*Image, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	img, err := s.Open(id)
	if err != nil {
		return nil, err
	}
	if err := img.Record.checkClaim(); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

// OpenSnapshot opens a snapshot, or returns [errdefs.ErrNotFound].
func (s *Store) OpenSnapshot(id string) (*Snapshot, error) {
	snap := &Snapshot{}
	var err error
	if snap.File, err = openFile("snapshot", id, s.pool.OpenSnapshot, &snap.Record); err != nil {
		return nil, err
	}
	if err := checkRecord(snap.File.Name(), id, snap.Record.ID, snap.Record.Version); err != nil {
		snap.Close()
		return nil, err
	}
	return snap, nil
}

// openFile opens an image and reads its record.
func openFile(kind, id string, open func(id string) (*os.File, error), record any) (*os.File, error) {
	f, err := open(id)
	if err != nil {
		return nil, explainOpen(kind, id, err)
	}
	if err := pool.GetRecord(f, pool.VolumeAttr, record); err != nil {
		f.Close()
		return nil, explainRecord(kind, id, err)
	}
	return f, nil
}

// New opens an empty unnamed file that can become a volume. It ends with its descriptor.
func (s *Store) New() (*os.File, error) { return s.pool.NewVolume() }

// NewSnapshot opens an empty unnamed file that can become a snapshot.
func (s *Store) NewSnapshot() (*os.File, error) { return s.pool.NewSnapshot() }

// Describe writes the record of a new image, whose content is complete.
func (s *Store) Describe(f *os.File, r Record) (*Image, error) {
	err := r.stamp()
	if err == nil {
		err = pool.SetRecord(f, pool.VolumeAttr, r)
	}
	return &Image{File: f, Record: r, Fresh: true}, err
}

// Link gives the image of an inline volume its name. From here on the volume exists.
func (s *Store) Link(img *Image) error {
	if img.Mode() == ModeDiskImage && !img.Synced {
		// An image with a name must be whole even after a power cut. The other modes need no
		// sync here: attaching the loop device syncs the image before anything is mounted.
		if err := tmpfile.Sync(img.File); err != nil {
			return pool.Full(err)
		}
	}
	return pool.Full(tmpfile.Link(img.File, s.pool.Volume(img.ID())))
}

// Publish gives the image of a claim its name, durably. From here on the volume exists. If
// it fails, it leaves nothing.
func (s *Store) Publish(img *Image) error {
	defer s.changing(VolumeKey(img.ID()))()
	how := tmpfile.Publish
	if img.Synced {
		how = tmpfile.PublishSynced
	}
	return published(how(img.File, s.pool.Volume(img.ID())), func() error { return s.Remove(img.ID()) })
}

// DescribeSnapshot writes the record of a new snapshot, whose content is complete.
func (s *Store) DescribeSnapshot(f *os.File, r SnapshotRecord) (*Snapshot, error) {
	r.Version = recordVersion
	return &Snapshot{File: f, Record: r}, pool.SetRecord(f, pool.VolumeAttr, r)
}

// PublishSnapshot gives a new snapshot its name, durably. From here on the snapshot exists.
// If it fails, it leaves nothing.
func (s *Store) PublishSnapshot(snap *Snapshot) error {
	id := snap.Record.ID
	defer s.changing(SnapshotKey(id))()
	return published(tmpfile.Publish(snap.File, s.pool.Snapshot(id)), func() error { return s.RemoveSnapshot(id) })
}

// published removes a name that could not be made durable.
func published(err error, remove func() error) error {
	if err != nil && !errors.Is(err, os.ErrExist) { // a file that exists is not the new one
		err = errors.Join(err, remove())
	}
	return pool.Full(err)
}

// Remove removes the name of a volume's image. An image that does not exist is fine.
func (s *Store) Remove(id string) error {
	defer s.changing(VolumeKey(id))()
	defer s.removed.Add(1)
	return s.pool.RemoveVolume(id)
}

// Keep takes a volume out of the pool's volumes, as [Store.Remove] does, and keeps its image for a golden. A power cut
// may bring it back, unless [Store.SyncNames] follows.
func (s *Store) Keep(img *Image) error {
	defer s.changing(VolumeKey(img.ID()))()
	return s.pool.KeepVolume(img.ID())
}

// OpenKept opens the image of a volume that is kept for a golden, or returns [errdefs.ErrNotFound].
func (s *Store) OpenKept(id string) (*Image, error) { return open(id, s.pool.OpenCommit) }

// RemoveKept removes the image of a volume that was kept for a golden. One that does not exist is fine.
func (s *Store) RemoveKept(id string) error {
	defer s.removed.Add(1)
	return s.pool.RemoveCommit(id)
}

// Removed counts the volumes and snapshots that were removed. Their space is not free at once.
func (s *Store) Removed() int64 { return s.removed.Load() }

// RemoveDurably removes the name so that a power cut does not bring it back.
func (s *Store) RemoveDurably(id string) error {
	if err := s.Remove(id); err != nil {
		return err
	}
	return s.SyncNames()
}

// SyncNames makes durable which names volumes have. After that a power cut brings none back that was removed.
func (s *Store) SyncNames() error { return tmpfile.SyncDir(s.Dir()) }

// RemoveSnapshot removes a snapshot, durably.
func (s *Store) RemoveSnapshot(id string) error {
	defer s.changing(SnapshotKey(id))()
	defer s.removed.Add(1)
	path := s.pool.Snapshot(id)
	if err := tmpfile.Remove(path); err != nil {
		return err
	}
	return tmpfile.SyncDir(filepath.Dir(path))
}

// Resize makes the image of a volume larger, durably, and updates its record.
func (s *Store) Resize(img *Image, bytes int64) error {
	defer s.changing(VolumeKey(img.ID()))()
	larger := img.Record
	larger.Version, larger.Spec.Size = recordVersion, bytes
	if err := s.boundAs(img, larger); err != nil && !errors.Is(err, pool.ErrProjectTaken) {
		return err
	}
	// Resize the file before its record: that must not promise space that is not there.
	if err := s.Extend(larger.Provisioning, img.File, bytes); err != nil {
		return pool.Full(err)
	}
	if err := pool.SetRecord(img.File, pool.VolumeAttr, larger); err != nil {
		return err
	}
	if err := tmpfile.Sync(img.File); err != nil {
		return pool.Full(err)
	}
	img.Record = larger
	return nil
}

// Replace gives a file the image's record and puts it in the image's place, durably. The
// caller holds the image's lock.
func (s *Store) Replace(img *Image, with *os.File) error {
	if err := pool.SetRecord(with, pool.VolumeAttr, img.Record); err != nil {
		return err
	}
	return pool.Full(tmpfile.Replace(with, s.pool.Volume(img.ID())))
}

// RemoveReplacement removes a file that was to replace a volume's image when its process
// died. If there is none, it returns [os.ErrNotExist]. If a living process is about to
// replace the image, it returns [errdefs.ErrUnderWay].
func (s *Store) RemoveReplacement(ctx context.Context, id string) error {
	img, err := s.Open(id)
	if err == nil {
		defer img.Close()
		var unlock func() error
		if unlock, err = s.Exclusive(ctx, img, lockPatience); err == nil {
			defer unlock()
		}
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	path := s.pool.Replacement(id)
	var is Record
	left, err := openFile("replacement", id, func(string) (*os.File, error) {
		return os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	}, &is)
	if errors.Is(err, errdefs.ErrNotFound) {
		return fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	if err != nil {
		return err
	}
	defer left.Close()
	if err := checkRecord(path, id, is.ID, is.Version); err != nil {
		return err
	}
	return tmpfile.Remove(path)
}

// lockPatience is how long to wait for an image's lock. Clones hold it for milliseconds.
const lockPatience = time.Second

// Exclusive locks an image against others that clone, expand, grow or delete it. If the lock
// is not free in time, or the image has changed since it was opened, it returns
// [errdefs.ErrUnderWay].
//
// A disk.img is not locked, because its pod could keep the lock for ever.
func (s *Store) Exclusive(ctx context.Context, img *Image, patience time.Duration) (unlock func() error, err error) {
	if img.Mode() == ModeDiskImage {
		return func() error { return nil }, nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	unlock, err = pool.LockImage(ctx, img.File)
	if errors.Is(err, pool.ErrLocked) {
		return nil, fmt.Errorf("%w: another operation works on the image of volume %s (%v); try again", errdefs.ErrUnderWay, img.ID(), err)
	}
	if err != nil {
		return nil, err
	}
	var now Record
	same, err := SameFile(img.File, s.pool.Volume(img.ID()))
	if err == nil && same {
		err = pool.GetRecord(img.File, pool.VolumeAttr, &now)
	}
	if err == nil && (!same || !now.Spec.Equal(img.Record.Spec)) {
		err = fmt.Errorf("%w: volume %s was changed meanwhile; try again", errdefs.ErrUnderWay, img.ID())
	}
	if err != nil {
		return nil, errors.Join(err, unlock())
	}
	return unlock, nil
}

// WasVolume reports whether the file behind a loop device was made as a volume of the pool.
// It reads this from the path that the kernel keeps. The path ends in "(deleted)" if the
// file had no name when it was attached, or has lost it since. The file may have a name by
// now: see [Store.IDs].
func (s *Store) WasVolume(index int) (bool, error) {
	path, err := loopdev.BackingFile(index)
	if err != nil {
		return false, err
	}
	_, deleted := strings.CutSuffix(path, " (deleted)")
	return deleted && filepath.Dir(path) == s.Dir(), nil
}

// FileID tells a file by what stat(2) says of it.
type FileID struct{ Device, Inode uint64 }

// IDs are the ids of all volumes by their files. It takes 1 µs for each.
func (s *Store) IDs() (map[FileID]string, error) {
	names, err := s.pool.Volumes()
	if err != nil {
		return nil, err
	}
	ids := map[FileID]string{}
	for _, id := range names {
		st, err := s.pool.StatVolume(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		ids[FileID{st.Device, st.Inode}] = id
	}
	return ids, nil
}

// Dir is the directory of the volumes' images.
func (s *Store) Dir() string { return filepath.Dir(s.pool.Volume("x")) }

// SameFile reports whether a path still names an open file.
func SameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}
