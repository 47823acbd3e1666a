// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// ClaimRequest asks for a persistent volume.
type ClaimRequest struct {
	Name string // unique; the id is made of it
	// Spec says what is inside. Its Size, in bytes, may be 0: then it is the
	// source's, or the filesystem's default.
	Spec   diskfs.Spec
	Limit  int64 // bytes the volume may have at most; 0 is no limit
	Mode   Mode
	Thick  bool
	Source Source
	// DefaultSpec tells that nothing but the size of Spec was asked for, so that a
	// source may decide.
	DefaultSpec bool
}

// maxNameAsID leaves room for what a token puts before an id: CSI has 128 bytes for
// that too.
const maxNameAsID = 120

// ID is the id that the volume has, or will have.
func (r ClaimRequest) ID() string { return idOf("vol-", r.Name) }

// SnapshotID is the id of the snapshot with the given name.
func SnapshotID(name string) string { return idOf("snap-", name) }

// idOf makes an id of the name that a container orchestrator suggests: the name
// itself where it can be one, so that people find their volumes, and else a digest
// of it. The record has the name, so that two that meet are found out.
func idOf(prefix, name string) string {
	if CheckID(name) == nil && len(name) <= maxNameAsID {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return prefix + hex.EncodeToString(sum[:16])
}

// Create makes a persistent volume, or finds it made. What it returns survives a
// power cut. Nothing of what it made is left when it fails.
//
// Errors are ErrInvalid, ErrExists for a different volume of that name,
// ErrNotFound for a source that is not there, ErrState, those of
// [diskfs.Spec.Validate] and [template.Store.Ensure], [pool.ErrFull], or the
// kernel's.
//
// What is thick, or of something thick, is copied, which may take longer than the
// caller has. Then the error is [ErrUnderWay], and the retry joins the work.
func (m *Manager) Create(ctx context.Context, r ClaimRequest) (Record, Result, error) {
	if !r.Thick && r.Source.Volume == "" {
		return m.createClaim(ctx, r)
	}
	type made struct {
		Record
		Result
	}
	v, err := outlive(ctx, m, volumeKey(r.ID()), func(ctx context.Context) (made, error) {
		v, res, err := m.createClaim(ctx, r)
		return made{v, res}, err
	})
	if err == nil { // what was joined may have been asked for otherwise
		err = v.sameClaim(r)
	}
	return v.Record, v.Result, err
}

func (m *Manager) createClaim(ctx context.Context, r ClaimRequest) (Record, Result, error) {
	id := r.ID()
	img, err := m.open(id)
	switch {
	case err == nil:
		defer img.Close()
		if err := img.sameClaim(r); err != nil {
			return Record{}, Result{}, err
		}
		torn, err := img.torn()
		if err != nil {
			return Record{}, Result{}, err
		}
		if !torn || m.unused(img) != nil {
			return img.Record, Result{Existed: true}, nil
		}
		klog.InfoS("Making a volume anew that a power cut has torn", "volume", id)
		if err := m.unlink(id); err != nil {
			return Record{}, Result{}, err
		}
	case !errors.Is(err, ErrNotFound):
		return Record{}, Result{}, err
	}
	from, err := m.complete(&r)
	if err != nil {
		return Record{}, Result{}, err
	}
	d := claimDemand(volumeKey(id), r.Spec.Size, r.Thick)
	d.now += from.copying(r.Thick)
	release, err := m.admit(d)
	if err != nil {
		return Record{}, Result{}, err
	}
	defer release()
	img, res, err := m.create(ctx, Record{
		ID: id, Lifecycle: Persistent, Name: r.Name, Spec: r.Spec, Mode: r.Mode, Thick: r.Thick, Source: r.Source,
	})
	if err != nil {
		return Record{}, res, err
	}
	defer img.Close()
	err = tmpfile.Publish(img.File, m.pool.Volume(id))
	if err != nil && !errors.Is(err, os.ErrExist) { // that would be another's
		err = errors.Join(err, m.unlink(id))
	}
	if err != nil {
		return Record{}, res, pool.Full(err)
	}
	return img.Record, res, nil
}

// origin is what a copy needs to know of its source.
type origin struct {
	spec  diskfs.Spec
	mode  Mode
	thick int64 // bytes that a thick volume has; 0 of anything else
}

// copying is what is taken at once, in bytes, when a thick volume is copied: as much
// as the volume itself may write anew meanwhile, and the copy, unless its space is
// counted already.
func (o origin) copying(thick bool) int64 {
	if thick {
		return o.thick
	}
	return 2 * o.thick
}

// complete decides what a request leaves open, validates it against its source and
// the limits, and tells what the source is.
func (m *Manager) complete(r *ClaimRequest) (from origin, err error) {
	if (r.Source != Source{}) {
		if from, err = m.describe(r.Source); err != nil {
			return from, err
		}
		if err := r.follow(from.spec, from.mode); err != nil {
			return from, err
		}
	}
	return from, r.decideSize()
}

// decideSize decides a size that was left open, and holds it against the limits.
func (r *ClaimRequest) decideSize() error {
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if err != nil {
		return err
	}
	if r.Spec.Size == 0 {
		r.Spec.Size = fs.DefaultSize()
		if r.Limit > 0 { // what is asked for is nothing in particular
			r.Spec.Size = max(min(r.Spec.Size, r.Limit/diskfs.MiB*diskfs.MiB), fs.MinSize)
		}
	}
	if r.Limit > 0 && r.Spec.Size > r.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: the volume would have %d bytes (sizes are whole MiB; %s takes at least %d); raise the limit",
			diskfs.ErrOutOfRange, r.Limit, r.Spec.Size, fs.Name, fs.MinSize)
	}
	if err := r.Spec.Validate(); errors.Is(err, diskfs.ErrOutOfRange) {
		return fmt.Errorf("capacity_range: %w", err)
	} else if err != nil {
		return err
	}
	return nil
}

// describe tells what a source is.
func (m *Manager) describe(s Source) (origin, error) {
	if s.Snapshot != "" {
		if err := CheckID(s.Snapshot); err != nil {
			return origin{}, fmt.Errorf("%w: snapshot_id: %w", ErrNotFound, err)
		}
		snap, err := m.openSnapshot(s.Snapshot)
		if err != nil {
			return origin{}, err
		}
		defer snap.Close()
		return origin{spec: snap.Spec, mode: snap.Mode}, nil
	}
	vol, err := m.openClaim(s.Volume)
	if errors.Is(err, ErrInvalid) {
		err = fmt.Errorf("%w: volume_id: %w", ErrNotFound, err)
	}
	if err != nil {
		return origin{}, err
	}
	defer vol.Close()
	o := origin{spec: vol.Spec, mode: vol.Mode}
	if vol.Thick {
		o.thick, err = allocated(vol.File)
	}
	return o, err
}

// follow makes a request what its source allows: the content is the source's,
// and the size at least that.
func (r *ClaimRequest) follow(from diskfs.Spec, mode Mode) error {
	if (r.Mode == ModeFilesystem) != (mode == ModeFilesystem) {
		return fmt.Errorf("%w: volume_content_source: %s is of the mode %s, asked for is %s: a mounted filesystem becomes a mounted filesystem only, a disk a disk only",
			ErrInvalid, r.Source, mode, r.Mode)
	}
	if r.Spec.Size > 0 && r.Spec.Size < from.Size {
		return fmt.Errorf("%w: capacity_range.required_bytes: %d bytes are asked for, %s has %d: ask for at least that",
			diskfs.ErrOutOfRange, r.Spec.Size, r.Source, from.Size)
	}
	size := max(r.Spec.Size, from.Size)
	asked := r.Spec
	asked.Size = from.Size
	// Of a disk nobody here knows what its consumer has put there.
	if mode == ModeFilesystem && !r.DefaultSpec && !asked.Equal(from) {
		return fmt.Errorf("%w: volume_content_source: %s is %s, the parameters ask for %s: a copy has the filesystem, label and format options of its source; use a class that has the same",
			ErrInvalid, r.Source, from, asked)
	}
	r.Spec = from
	r.Spec.Size = size
	return nil
}

// MadeAs reports how a volume differs from what a request, of whatever name, size and
// source, would have made.
func (have Record) MadeAs(r ClaimRequest) error {
	r.Name, r.Spec.Size, r.Limit, r.Source = have.Name, have.Spec.Size, 0, have.Source
	if r.DefaultSpec {
		r.Spec = have.Spec
	}
	return have.sameClaim(r)
}

// sameClaim reports how a request differs from the claim that has its id.
func (have Record) sameClaim(r ClaimRequest) error {
	var diff differences
	diff.add("name", have.Name, r.Name)
	diff.add("lifecycle", have.Lifecycle, Persistent)
	asked := r.Spec
	if (r.Source != Source{}) && (r.DefaultSpec || r.Mode != ModeFilesystem) { // it decided, and may be gone
		asked = have.Spec
		asked.Size = r.Spec.Size
	}
	fits := asked.Size <= have.Spec.Size && (r.Limit == 0 || have.Spec.Size <= r.Limit)
	if asked.Size = have.Spec.Size; !fits || !have.Spec.Equal(asked) {
		limit := "no limit"
		if r.Limit > 0 {
			limit = fmt.Sprintf("at most %d bytes", r.Limit)
		}
		diff.add("content", have.Spec.String(), fmt.Sprintf("%s, %s", r.Spec, limit))
	}
	diff.add("mode", have.Mode, r.Mode)
	diff.add("thick", have.Thick, r.Thick)
	diff.add("source", have.Source, r.Source)
	return diff.error("volume " + have.ID + "; use another name")
}

// differences collects how what there is differs from what was asked for.
type differences []string

func (d *differences) add(field string, is, asked any) {
	if is != asked {
		*d = append(*d, fmt.Sprintf("%s is %v, asked for %v", field, is, asked))
	}
}

func (d differences) error(what string) error {
	if len(d) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s: %s", ErrExists, what, strings.Join(d, ", "))
}

// settleTime is how long a volume that was just unmounted may look attached: while
// a process that is being started holds a copy of the mount table. That takes
// milliseconds, and on a busy machine some hundred.
const settleTime = time.Second

// settlePoll is how often it is looked at meanwhile.
const settlePoll = 5 * time.Millisecond

// Delete removes a persistent volume. One that does not exist is fine. One that
// is in use is ErrState, one that is being made, copied or grown [ErrUnderWay].
// Copies and snapshots of it stay whole.
func (m *Manager) Delete(id string) error {
	img, err := m.openClaim(id)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrInvalid) && id != "" {
		// CSI 1.13, DeleteVolume: what was never made is gone.
		return m.space.notMaking(volumeKey(id))
	}
	if err != nil {
		return err
	}
	defer img.Close()
	if err := m.pool.Check(); err != nil {
		return err
	}
	unlock, err := m.exclusive(m.ctx, img, settleTime)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.unused(img); err != nil {
		return err
	}
	if err := m.unlink(id); err != nil {
		return err
	}
	return tmpfile.SyncDir(filepath.Dir(m.pool.Volume(id)))
}

// unused is ErrState while a volume is attached or published.
func (m *Manager) unused(img *image) error {
	deadline := time.Now().Add(settleTime)
	for {
		loops, err := loopdev.Find(img.File)
		if err != nil {
			return err
		}
		places, err := m.placesOf(img, loops)
		if err != nil {
			return err
		}
		switch {
		case len(places) > 0:
			return fmt.Errorf("%w: volume %s is in use at %s; unpublish and unstage it first", ErrState, img.ID, places[0])
		case len(loops) == 0:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("%w: volume %s is attached as /dev/loop%d, though nothing of it is mounted here: it is staged as a block device, or another mount namespace has a copy of its mount; unstage it, or end that process",
				ErrState, img.ID, loops[0])
		}
		time.Sleep(settlePoll)
	}
}

// Get describes a persistent volume.
func (m *Manager) Get(id string) (Record, error) {
	img, err := m.openClaim(id)
	if err != nil {
		return Record{}, err
	}
	defer img.Close()
	return img.Record, nil
}

// Claims lists the persistent volumes by id, from behind the id after, at most
// limit of them; 0 is no limit. next is "" at the end, and else what to put for
// after.
func (m *Manager) Claims(after string, limit int) (claims []Record, next string, err error) {
	ids, err := m.pool.Volumes()
	if err != nil {
		return nil, "", err
	}
	return page(ids, after, limit, func(id string) (Record, error) {
		return m.Get(id)
	})
}

// page reads those of the sorted ids that come after one. What cannot be read is
// reported and left out: it must not hide the others.
func page[T any](ids []string, after string, limit int, read func(id string) (T, error)) (found []T, next string, err error) {
	i, exact := slices.BinarySearch(ids, after)
	if exact {
		i++
	}
	var last string
	for _, id := range ids[i:] {
		one, err := read(id)
		if errors.Is(err, ErrNotFound) { // not one of these, or gone meanwhile
			continue
		}
		if err != nil {
			klog.ErrorS(err, "Leaving out of a list what cannot be read", "id", id)
			continue
		}
		if limit > 0 && len(found) == limit {
			return found, last, nil
		}
		found, last = append(found, one), id
	}
	return found, "", nil
}
