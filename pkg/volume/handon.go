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

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// HandOn makes a CSI snapshot of a golden's generation for the claims of a namespace, durably, or finds it made.
// Number 0 is the newest generation. The golden may go afterwards.
//
// Each namespace gets a snapshot of its own, so that deleting it takes nothing from another one. The snapshot has no
// claim: as its source it names the generation's UUID. It shares its extents with the generation, and so takes no space
// of the pool until that goes. A running plugin counts it from its next sweep on.
//
// Errors are [errdefs.ErrNotFound], [errdefs.ErrState] for a damaged generation, [pool.ErrFull], or the kernel's.
func (p *Promoter) HandOn(
	ctx context.Context, g golden.Generation, namespace string,
) (golden.Record, image.SnapshotRecord, error) {
	from, err := p.open(g)
	if err != nil {
		return golden.Record{}, image.SnapshotRecord{}, err
	}
	defer from.Close()
	r := from.Record
	for {
		have, exists, err := p.handedOn(r, namespace)
		if err != nil || exists {
			return r, have, err
		}
		made, err := p.snapshot(ctx, from, namespace)
		if !errors.Is(err, os.ErrExist) { // another one makes the same snapshot
			return r, made, err
		}
	}
}

func (p *Promoter) open(g golden.Generation) (*golden.Golden, error) {
	if g.Number == 0 {
		return p.goldens.Newest(g.Name)
	}
	return p.goldens.Open(g)
}

// handedOnAs is the name of the snapshot of a generation for a namespace. Numbers of generations begin anew when all
// of a golden were removed; a UUID does not.
func handedOnAs(r golden.Record, namespace string) (name, source string) {
	return fmt.Sprintf("golden %s (%s) for namespace %s", r.Is(), r.UUID, namespace), "golden-" + r.UUID.String()
}

// handedOn looks for the snapshot of a generation for a namespace. If a power cut has taken its content, it removes the
// snapshot, and reports that there is none.
func (p *Promoter) handedOn(r golden.Record, namespace string) (have image.SnapshotRecord, exists bool, err error) {
	name, source := handedOnAs(r, namespace)
	snap, err := p.images.OpenSnapshot(SnapshotID(name))
	if errors.Is(err, errdefs.ErrNotFound) {
		return have, false, nil
	}
	if err != nil {
		return have, false, err
	}
	defer snap.Close()
	if err := compareSnapshot(snap.Record, name, source); err != nil {
		return have, false, err
	}
	fi, err := snap.File.Stat()
	if err != nil || fi.Size() > 0 {
		return snap.Record, err == nil, err
	}
	return have, false, p.images.RemoveSnapshot(snap.Record.ID) // nobody was told of it yet
}

// snapshot makes the snapshot of a generation for a namespace.
func (p *Promoter) snapshot(ctx context.Context, from *golden.Golden, namespace string) (image.SnapshotRecord, error) {
	f, err := p.images.NewSnapshot()
	if err != nil {
		return image.SnapshotRecord{}, err
	}
	defer f.Close()
	g := from.Record
	name, source := handedOnAs(g, namespace)
	r := image.SnapshotRecord{
		ID: SnapshotID(name), Name: name, Volume: source, Spec: g.Spec, Mode: image.ModeFilesystem,
		UUID: uuid.New(), Created: time.Now().UTC(),
	}
	if err := p.clone(ctx, f, from.File, r.Spec, r.UUID); err != nil {
		return r, pool.Full(fmt.Errorf("snapshot of golden %s: %w", g.Is(), err))
	}
	snap, err := p.images.DescribeSnapshot(f, r)
	if err != nil {
		return r, pool.Full(err)
	}
	return snap.Record, p.images.PublishSnapshot(snap)
}

// clone gives an empty file the content of another one, which has a filesystem, and the filesystem an identity.
func (p *Promoter) clone(ctx context.Context, f, src *os.File, spec diskfs.Spec, id uuid.UUID) error {
	if err := p.images.Fill(ctx, image.Thin, f, src, spec.Size); err != nil {
		return err
	}
	return p.copies.newIdentity(f, spec.Filesystem, id)
}
