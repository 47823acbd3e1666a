// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// ClaimRequest asks for a claim.
type ClaimRequest struct {
	Name string // unique; the id is made of it
	// Spec is the content. Its Size, in bytes, may be 0. Then the size is the source's, or
	// the filesystem's default. A size below the filesystem's smallest one is raised to that.
	Spec         diskfs.Spec
	Limit        int64 // most bytes that the volume may have; 0 means no limit
	Mode         image.Mode
	Provisioning image.Provisioning
	Source       image.Source
	// Lineage counts only where there is no source.
	image.Lineage
	// DefaultSpec means that only size and content of Spec were asked for.
	DefaultSpec bool
	// AnyFilesystem and AnyMode mean that no parameter of the class decides the filesystem, or whether a mounted claim
	// is a disk image. Then a source decides. An fsType does not count as a parameter.
	AnyFilesystem, AnyMode bool
	// Namespace is that of the PersistentVolumeClaim; "" if the provisioner does not tell it.
	Namespace string
}

// maxNameAsID leaves room for the prefix of a list's token: CSI has 128 bytes for that too.
const maxNameAsID = 120

// ID is the id that the volume has, or will have.
func (r ClaimRequest) ID() string { return idOf("vol-", r.Name) }

// record is what the claim's image will say.
func (r ClaimRequest) record() image.Record {
	is := image.Record{
		ID: r.ID(), Lifecycle: image.Claim, Name: r.Name, Spec: r.Spec, Mode: r.Mode, Provisioning: r.Provisioning, Source: r.Source, Lineage: r.Lineage,
	}
	if r.CommitTo != "" {
		is.Pod.Namespace = r.Namespace
	}
	return is
}

// Validate checks what a request says of goldens, without looking at the node. Errors are [errdefs.ErrInvalid].
func (r ClaimRequest) Validate() error {
	return checkLineage(r.Lineage, r.Spec, r.Mode, false, "parameter")
}

// SnapshotID is the id of the snapshot with the given name.
func SnapshotID(name string) string { return idOf("snap-", name) }

// idOf makes an id of the name that a container orchestrator suggests. It is the name itself
// if that is a valid id, so that people find their volumes, and a digest of it otherwise.
// Two names with one digest would be noticed, because the record has the name.
func idOf(prefix, name string) string {
	if image.CheckID(name) == nil && len(name) <= maxNameAsID {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return prefix + hex.EncodeToString(sum[:16])
}

// origin is what a copy needs to know of its source.
type origin struct {
	spec         diskfs.Spec
	mode         image.Mode
	provisioning image.Provisioning
	allocated    int64 // bytes that are copied; only of a source that does not share its extents
}

// complete decides what a request leaves open, checks the request by its source and the
// limits, and returns what the source is, or the golden, which the caller closes.
func (m *Manager) complete(r *ClaimRequest) (from origin, start *golden.Golden, err error) {
	if (r.Source != image.Source{}) {
		if err := m.commits.check(r.Lineage, r.Namespace); err != nil {
			return from, nil, err
		}
		if from, err = m.origin(r.Source); err != nil {
			return from, nil, err
		}
		if err := r.follow(from); err != nil {
			return from, nil, err
		}
	} else {
		r.Spec.Size = raised(r.Spec.Size, r.Spec.Filesystem)
		if r.Spec, start, err = m.start(r.Lineage, r.Spec, r.Mode, r.Namespace); err != nil {
			return from, nil, err
		}
	}
	if err := r.decideSize(); err != nil {
		start.Close()
		return from, nil, err
	}
	return from, start, nil
}

// origin looks at a source.
func (m *Manager) origin(s image.Source) (origin, error) {
	if s.Snapshot != "" {
		if err := image.CheckID(s.Snapshot); err != nil {
			return origin{}, fmt.Errorf("%w: there is no snapshot %.32q on this node", errdefs.ErrNotFound, s.Snapshot)
		}
		snap, err := m.images.OpenSnapshot(s.Snapshot)
		if err != nil {
			return origin{}, err
		}
		defer snap.Close()
		return origin{spec: snap.Record.Spec, mode: snap.Record.Mode}, nil
	}
	vol, err := m.images.OpenClaim(s.Volume)
	if errors.Is(err, errdefs.ErrInvalid) {
		err = fmt.Errorf("%w: there is no volume %.32q on this node", errdefs.ErrNotFound, s.Volume)
	}
	if err != nil {
		return origin{}, err
	}
	defer vol.Close()
	o := origin{spec: vol.Record.Spec, mode: vol.Mode(), provisioning: vol.Record.Provisioning}
	if !o.provisioning.SharesExtents() {
		o.allocated, err = copied(vol)
	}
	return o, err
}

// follow gives a request the content of its source, and at least the source's size. A
// request that asks for anything else returns [errdefs.ErrInvalid] or
// [diskfs.ErrOutOfRange].
func (r *ClaimRequest) follow(from origin) error {
	if r.Mode = r.modeOf(from.mode); r.Mode == image.ModeDiskImage {
		if err := r.Validate(); err != nil { // goldens are not for disks
			return err
		}
	}
	if (r.Mode == image.ModeFilesystem) != (from.mode == image.ModeFilesystem) {
		return fmt.Errorf("%w: dataSource: %s has mode %s, and mode %s is asked for: a filesystem can be copied only to a filesystem, and a disk only to a disk",
			errdefs.ErrInvalid, r.Source, from.mode, r.Mode)
	}
	r.Spec.Size = raised(r.Spec.Size, from.spec.Filesystem)
	if r.Spec.Size > 0 && r.Spec.Size < from.spec.Size {
		return fmt.Errorf("%w: size: %s is less than the %s of %s; ask for at least that",
			diskfs.ErrOutOfRange, size.Format(r.Spec.Size), size.Format(from.spec.Size), r.Source)
	}
	bytes := max(r.Spec.Size, from.spec.Size)
	if asked := r.asSource(from.spec); !asked.Equal(from.spec) {
		return fmt.Errorf("%w: dataSource: %s is %s, and %s is asked for: a copy has the filesystem, label and format options of its source; use a StorageClass with the same, or with none of them",
			errdefs.ErrInvalid, r.Source, from.spec, asked)
	}
	r.Spec = from.spec
	r.Spec.Size = bytes
	return nil
}

// modeOf is the mode of a copy whose source, or which itself, has the given mode. A mounted copy of a disk is a disk
// image, unless the class says otherwise.
func (r *ClaimRequest) modeOf(mode image.Mode) image.Mode {
	if r.AnyMode && mode != image.ModeFilesystem {
		return image.ModeDiskImage
	}
	return r.Mode
}

// asSource is what a request asks of a copy, where have is what the source or the copy has: what no parameter asks for
// is as it is there. Sizes are compared elsewhere. The plugin does not know what its consumer has put on a disk, so it
// does not compare disks.
func (r *ClaimRequest) asSource(have diskfs.Spec) diskfs.Spec {
	if r.Mode != image.ModeFilesystem {
		return have
	}
	asked := have
	if !r.AnyFilesystem {
		asked.Filesystem = cmp.Or(r.Spec.Filesystem, have.Filesystem)
	}
	asked.Label = cmp.Or(r.Spec.Label, have.Label)
	if len(r.Spec.Options) > 0 {
		asked.Options = r.Spec.Options
	}
	return asked
}

// raised returns the size that was asked for, in bytes, or the smallest one of the filesystem if that is more: a claim
// has at least the size that was asked for (CSI 1.13, CapacityRange). [ClaimRequest.decideSize] checks the limit. A
// size of 0 stays open. A request for a copy may name the size that its source was asked for, and is raised as well.
func raised(bytes int64, filesystem string) int64 {
	fs, err := diskfs.Lookup(cmp.Or(filesystem, diskfs.Default))
	if err != nil || bytes == 0 { // [diskfs.Spec.Validate] reports the error
		return bytes
	}
	return max(bytes, fs.MinSize)
}

// decideSize decides a size that was left open, and checks it against the limits.
func (r *ClaimRequest) decideSize() error {
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if err != nil {
		return err
	}
	if r.Spec.Size == 0 {
		r.Spec.Size = fs.DefaultSize()
		if r.Limit > 0 { // the default was not asked for, so it may be less
			r.Spec.Size = max(min(r.Spec.Size, r.Limit/diskfs.MiB*diskfs.MiB), fs.MinSize)
		}
	}
	if r.Limit > 0 && r.Spec.Size > r.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: the volume would have %s (sizes are whole Mi, and %s takes at least %s); raise the limit",
			diskfs.ErrOutOfRange, r.Limit, size.Format(r.Spec.Size), fs.Name, size.Format(fs.MinSize))
	}
	if err := r.Spec.Validate(); errors.Is(err, diskfs.ErrOutOfRange) {
		return fmt.Errorf("size: %w", err)
	} else if err != nil {
		return err
	}
	return nil
}
