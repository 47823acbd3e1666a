// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Result tells how a request was met.
type Result struct {
	Template    string       // key; "" if the volume needed no template
	TemplateHit bool         // the template was there when the volume was asked for first
	Golden      string       // generation that the volume started from; "" if from none
	Source      image.Source // snapshot or volume that it was copied from
	Existed     bool         // the volume existed already
	// Durability is that of an inline volume that is a mounted filesystem.
	Durability image.Durability
}

// contents makes new images: empty, from a template, or from a snapshot or volume.
type contents struct {
	templates *template.Store
	images    *image.Store
	goldens   *golden.Store
	copies    *copies
	misses    *misses
	warm      warmth
}

// open is a volume's image, and its filesystem where that is mounted at no path yet.
type open struct {
	img  *image.Image
	root *mount.Detached
}

// close closes what there is of both.
func (o open) close() {
	if o.root != nil {
		o.root.Close()
	}
	if o.img != nil {
		o.img.Close()
	}
}

// newImage makes the image of a new volume: first the content that the record asks for, with
// a filesystem identity of its own, then the record. The image has no name yet, and goes
// away with its descriptor. One that is ready already only gets its record.
//
// from is the golden that it starts from, or nil.
func (c contents) newImage(ctx context.Context, r image.Record, from *golden.Golden) (open, Result, error) {
	r.Created = time.Now().UTC()
	if from != nil {
		r.Golden = from.Record.Is().String()
		c.goldens.Touch(from.Record.Is())
	}
	kind, fits := c.warm.kind(r, from)
	if fits {
		if v := c.warm.take(kind); v != nil {
			r.Template, r.UUID = kind.Template, v.UUID
			res := Result{Template: r.Template, Golden: r.Golden, TemplateHit: r.Template != "" && !c.misses.has(r.ID)}
			vol, err := c.describe(v.File, v.Root, r)
			if err == nil {
				vol.img.Fresh, vol.img.Synced = v.Root == nil, true
			}
			return vol, res, err
		}
	}
	f, err := c.images.New()
	if err != nil {
		return open{}, Result{}, err
	}
	res, err := c.fill(ctx, f, &r, from)
	if err != nil {
		f.Close()
		return open{}, res, pool.Full(err)
	}
	if fits {
		c.warm.want(kind, r)
	}
	vol, err := c.describe(f, nil, r)
	return vol, res, err
}

// describe writes the record of a new image. If that fails, it closes the image and its filesystem.
func (c contents) describe(f *os.File, root *mount.Detached, r image.Record) (vol open, err error) {
	vol.root = root
	if vol.img, err = c.images.Describe(f, r); err != nil {
		vol.close()
		return open{}, pool.Full(err)
	}
	return vol, nil
}

// fill gives an empty file the content that a record asks for, and completes the record.
func (c contents) fill(ctx context.Context, f *os.File, r *image.Record, from *golden.Golden) (Result, error) {
	switch {
	case from != nil:
		return Result{Golden: r.Golden}, c.fillFromGolden(ctx, f, from, r)
	case r.Source != image.Source{}:
		return Result{Source: r.Source}, c.fillFromSource(ctx, f, r)
	case r.Spec.IsDisk() && r.Spec.Content == "":
		return Result{}, c.images.Extend(r.Provisioning, f, r.Spec.Size)
	}
	return c.fillFromTemplate(ctx, f, r)
}

func (c contents) fillFromTemplate(ctx context.Context, f *os.File, r *image.Record) (Result, error) {
	t, err := c.templates.Ensure(ctx, r.Spec)
	if err != nil || !t.Hit {
		c.misses.note(r.ID)
	}
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
	r.Template = t.Key
	if r.Spec.IsDisk() {
		err = c.cloneDisk(ctx, f, t, r)
	} else {
		r.UUID, err = c.clone(ctx, f, t, r.Provisioning)
	}
	return Result{Template: t.Key, TemplateHit: !c.misses.has(r.ID)}, err
}

// clone gives an empty file the content of a template, with an identity of its own.
func (c contents) clone(ctx context.Context, f *os.File, t *template.Template, p image.Provisioning) (uuid.UUID, error) {
	fs, err := diskfs.Lookup(t.Spec.Filesystem)
	if err != nil {
		return uuid.UUID{}, err
	}
	if err := c.images.Fill(ctx, p, f, t.File, t.Bytes); err != nil {
		return uuid.UUID{}, fmt.Errorf("from template %s: %w", t.Key, err)
	}
	// The image gets its UUID before anyone can mount it: a kernel refuses, or confuses, two
	// filesystems with one UUID. The new blocks are built from the template's, which are in
	// memory.
	id := uuid.New()
	return id, fs.NewIdentity(t.File, f, id)
}

// cloneDisk gives an empty file the disk of a template, and the record's size: the rest is empty. What is inside
// has the identity that it has everywhere, as on a disk that was copied.
func (c contents) cloneDisk(ctx context.Context, f *os.File, t *template.Template, r *image.Record) error {
	if err := checkHolds(r.Spec, t.Bytes); err != nil {
		return err
	}
	if err := c.images.Fill(ctx, r.Provisioning, f, t.File, t.Bytes); err != nil {
		return fmt.Errorf("from template %s: %w", t.Key, err)
	}
	return c.images.Extend(r.Provisioning, f, r.Spec.Size)
}

// fillFromSource gives an empty file the content that its source has at this moment, within
// the size that the source's record says. The rest of a larger volume is empty.
func (c contents) fillFromSource(ctx context.Context, f *os.File, r *image.Record) error {
	if err := c.copySource(ctx, f, r); err != nil {
		return fmt.Errorf("from %s: %w", r.Source, err)
	}
	if err := c.images.Extend(r.Provisioning, f, r.Spec.Size); err != nil {
		return err
	}
	if r.Mode != image.ModeFilesystem {
		return nil // a disk is copied to the byte: its consumer decides what is inside
	}
	r.UUID = uuid.New()
	if err := c.copies.newIdentity(f, r.Spec.Filesystem, r.UUID); err != nil {
		return fmt.Errorf("from %s: %w", r.Source, err)
	}
	return nil
}

func (c contents) copySource(ctx context.Context, f *os.File, r *image.Record) error {
	if r.Source.Snapshot != "" {
		snap, err := c.images.OpenSnapshot(r.Source.Snapshot)
		if err != nil {
			return err
		}
		defer snap.Close()
		if err := snap.CheckLength(); err != nil {
			return err
		}
		return c.images.Fill(ctx, r.Provisioning, f, snap.File, snap.Record.Spec.Size)
	}
	vol, err := c.images.OpenClaim(r.Source.Volume)
	if err != nil {
		return err
	}
	defer vol.Close()
	if err := vol.CheckSource(); err != nil {
		return err
	}
	if has := vol.Record.Spec.Size; has > r.Spec.Size {
		return fmt.Errorf("%w: the source was expanded to %s meanwhile; try again", errdefs.ErrUnderWay, size.Format(has))
	}
	return c.copies.copyLive(ctx, vol, f, r.Provisioning)
}
