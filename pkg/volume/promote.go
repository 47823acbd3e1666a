// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Promoter makes goldens of snapshots and templates, and snapshots of goldens. What it makes has no name until it is
// whole, so it may work beside a running plugin.
type Promoter struct {
	generations
	images *image.Store
}

// NewPromoter returns a Promoter of a pool.
func NewPromoter(p *pool.Pool) *Promoter {
	images, goldens := image.NewStore(p), golden.NewStore(p)
	copies := &copies{images: images, devices: device.New(p, images)}
	return &Promoter{generations{pool: p, goldens: goldens, copies: copies}, images}
}

// Promoted is a new generation, and those that went because the golden had too many.
type Promoted struct {
	golden.Generation
	Gone []golden.Generation
}

// Snapshot makes a claim's snapshot the newest generation of a golden, durably. The oldest ones go until the golden
// has no more than so many; 0 means no limit. If it fails, there is no new generation, or, if only removing failed,
// all of them are there. The mark that asks for a commit is not part of the generation: volumes that start from it
// would all commit.
//
// Errors are [errdefs.ErrNotFound], [errdefs.ErrState] for a snapshot of a disk or a damaged one, [pool.ErrFull], or
// the kernel's.
func (p *Promoter) Snapshot(ctx context.Context, id string, to golden.Name, generations int) (Promoted, error) {
	if err := image.CheckID(id); err != nil {
		return Promoted{}, err
	}
	snap, err := p.images.OpenSnapshot(id)
	if err != nil {
		return Promoted{}, err
	}
	defer snap.Close()
	r := snap.Record
	if r.Mode != image.ModeFilesystem {
		return Promoted{}, fmt.Errorf("%w: snapshot %s is of a disk (mode %s), and a golden is a filesystem that pods mount; "+
			"take a snapshot of a claim whose mode is %s", errdefs.ErrState, id, r.Mode, image.ModeFilesystem)
	}
	if err := snap.CheckLength(); err != nil {
		return Promoted{}, err
	}
	return p.promote(ctx, snap.File, generations, golden.Record{
		Namespace: to.Namespace, Name: to.Name, Spec: r.Spec,
		By: fmt.Sprintf("snapshot %s of claim %s", id, p.claimName(r.Volume)),
	})
}

// claimName is what people call a claim: the name that it was asked for by, or the id of one that is gone.
func (p *Promoter) claimName(id string) string {
	if r, err := p.images.GetClaim(id); err == nil && r.Name != "" {
		return r.Name
	}
	return id
}

// CheckPromotable returns [errdefs.ErrState] if a content is a whole disk.
func CheckPromotable(spec diskfs.Spec) error {
	if !spec.IsDisk() {
		return nil
	}
	return fmt.Errorf("%w: content %s is a whole disk, and a golden is a filesystem that pods mount; "+
		"promote a content of archives", errdefs.ErrState, spec.Content)
}

// Template is [Promoter.Snapshot] for a template with a content.
func (p *Promoter) Template(
	ctx context.Context, t *template.Template, to golden.Name, generations int,
) (Promoted, error) {
	if err := CheckPromotable(t.Spec); err != nil {
		return Promoted{}, err
	}
	return p.promote(ctx, t.File, generations, golden.Record{
		Namespace: to.Namespace, Name: to.Name, Spec: t.Spec, By: "content " + t.Spec.Content,
	})
}

// promote makes a generation of a file, as a commit does.
func (p *Promoter) promote(ctx context.Context, src *os.File, generations int, r golden.Record) (Promoted, error) {
	if _, err := p.pool.GoldensChanged(); errors.Is(err, os.ErrNotExist) {
		return Promoted{}, fmt.Errorf("%w: the pool is of an older plugin, and has no place for goldens; "+
			"start this version of the plugin on it once, and try again", errdefs.ErrState)
	}
	all, err := p.goldens.Held()
	if err != nil {
		return Promoted{}, err
	}
	to := r.Is().Name
	gone, err := golden.Limits{Generations: generations}.Admit(all, to, 0)
	if err != nil {
		return Promoted{}, err
	}
	r.Spec.Content = "" // what is there now need not be what the operator calls by that name
	f, id, err := p.prepare(ctx, src, r.Spec, image.CommitAlways)
	if err != nil {
		return Promoted{}, fmt.Errorf("%s: %w", r.By, err)
	}
	defer f.Close()
	r.UUID, r.Created = id, time.Now().UTC()
	is, err := p.goldens.Publish(f, r)
	if err != nil {
		return Promoted{}, fmt.Errorf("golden %s: %w", to, err)
	}
	made := Promoted{Generation: is}
	for _, h := range gone {
		made.Gone = append(made.Gone, h.Generation)
	}
	return made, p.goldens.RemoveDurably(made.Gone...)
}
