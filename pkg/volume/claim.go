// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"slices"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// CreateClaim makes a claim, or finds it made. A claim that it returned survives a power
// cut. If it fails, it leaves nothing that it made.
//
// Errors are [errdefs.ErrInvalid], [errdefs.ErrExists] for a different volume of that name,
// [errdefs.ErrNotFound] for a source that does not exist, [errdefs.ErrState],
// [errdefs.ErrBusy], those of [diskfs.Spec.Validate] and [template.Store.Ensure],
// [pool.ErrFull], or the kernel's.
//
// A thick claim, and a clone of a volume, may take longer than the caller has time. Then
// the error is [errdefs.ErrUnderWay], and the same request joins the work.
func (m *Manager) CreateClaim(ctx context.Context, r ClaimRequest) (image.Record, Result, error) {
	unlock, err := m.locks.volume(r.ID())
	if err != nil {
		return image.Record{}, Result{}, err
	}
	defer unlock()
	if !r.Provisioning.TakesTime() && r.Source.Volume == "" {
		return m.createClaim(ctx, r)
	}
	type made struct {
		image.Record
		Result
	}
	v, err := outlive(ctx, &m.work, "making volume "+r.ID(), func(ctx context.Context) (made, error) {
		v, res, err := m.createClaim(ctx, r)
		return made{v, res}, err
	})
	if err == nil { // another request may have started the work that this one joined
		err = r.compare(v.Record)
	}
	return v.Record, v.Result, err
}

func (m *Manager) createClaim(ctx context.Context, r ClaimRequest) (image.Record, Result, error) {
	id := r.ID()
	have, exists, err := m.existing(r)
	if err != nil || exists {
		return have, Result{Existed: exists}, err
	}
	from, start, err := m.complete(&r)
	if err != nil {
		return image.Record{}, Result{}, err
	}
	defer start.Close()
	d := space.Claim(image.VolumeKey(id), r.Spec.Size, r.Provisioning)
	d.Now += from.provisioning.CopyCost(from.allocated, r.Provisioning)
	release, err := m.space.Admit(d)
	if err != nil {
		return image.Record{}, Result{}, err
	}
	defer release()
	vol, res, err := m.contents.newImage(ctx, r.record(), start)
	if err != nil {
		return image.Record{}, res, err
	}
	defer vol.close()
	if err := m.images.Publish(vol.img); err != nil {
		return image.Record{}, res, err
	}
	m.made(id, res) // here and not by the caller, who may be gone by now
	return vol.img.Record, res, nil
}

// existing looks for the claim that a request asks for. It removes a torn one that nobody
// uses, and reports that there is none.
func (m *Manager) existing(r ClaimRequest) (have image.Record, exists bool, err error) {
	img, err := m.images.Open(r.ID())
	if errors.Is(err, errdefs.ErrNotFound) {
		return have, false, nil
	}
	if err != nil {
		return have, false, err
	}
	defer img.Close()
	if err := r.compare(img.Record); err != nil {
		return have, false, err
	}
	torn, err := img.Torn()
	if err != nil {
		return have, false, err
	}
	if !torn || m.root.CheckUnused(img) != nil {
		return img.Record, true, nil
	}
	logs.Warn("A power cut took the content of a volume; making it again", "volume", r.ID())
	return have, false, m.images.Remove(r.ID())
}

// DeleteClaim removes a claim. One that does not exist is fine. One that is in use returns
// [errdefs.ErrState], and one that is being made, copied or grown [errdefs.ErrBusy] or
// [errdefs.ErrUnderWay]. Copies and snapshots of it stay as they are.
func (m *Manager) DeleteClaim(id string) (err error) {
	unlock, err := m.locks.volume(id)
	if err != nil {
		return err
	}
	defer unlock()
	img, err := m.images.OpenClaim(id)
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrInvalid) && id != "" {
		// CSI 1.13, DeleteVolume: to delete a volume that was never made succeeds.
		return m.space.CheckNotMaking(image.VolumeKey(id))
	}
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		switch {
		case kept:
		case err == nil:
			m.endings.image(img)
		default:
			img.Close()
		}
	}()
	if err := m.pool.Check(); err != nil {
		return err
	}
	unlockImage, err := m.images.Exclusive(m.work.ctx, img, place.SettleTime)
	if err != nil {
		return err
	}
	defer unlockImage()
	if err := m.root.CheckUnused(img); err != nil {
		return err
	}
	if kept = m.commits.keep(img, nil); kept {
		m.endings.kept(img, place.Cleared{Device: -1}, func(unwritten error) { m.commits.begin(img.Record, unwritten) })
		return m.images.SyncNames()
	}
	return m.images.RemoveDurably(id)
}

// GetClaim describes a claim.
func (m *Manager) GetClaim(id string) (image.Record, error) { return m.images.GetClaim(id) }

// ListClaims lists at most limit claims in the order of their ids, beginning with the first
// id behind after. A limit of 0 means no limit. next is the value of after for the next
// call, or "" at the end of the list.
func (m *Manager) ListClaims(after string, limit int) (claims []image.Record, next string, err error) {
	ids, err := m.pool.Volumes()
	if err != nil {
		return nil, "", err
	}
	return page(ids, after, limit, &m.unread, m.images.GetClaim)
}

// page reads the images whose ids, which are sorted, come behind after. An image that cannot
// be read is logged, now and then, and left out: it must not hide the others.
func page[T any](ids []string, after string, limit int, unread *logs.Repeats, read func(id string) (T, error)) (found []T, next string, err error) {
	i, exact := slices.BinarySearch(ids, after)
	if exact {
		i++
	}
	var last string
	if ids = ids[i:]; limit == 0 {
		found = make([]T, 0, len(ids))
	}
	for len(ids) > 0 {
		n := min(len(ids), mostRead)
		if limit > 0 { // one more than the page has room for tells whether there is a next page
			n = min(n, max(limit-len(found)+1, leastRead))
		}
		ones, errs := readImages(ids[:n], read)
		for i, id := range ids[:n] {
			switch {
			case errors.Is(errs[i], errdefs.ErrNotFound): // not one of these, or deleted meanwhile
			case errs[i] != nil:
				if show, left := unread.Failed(id, "read"); show {
					klog.ErrorS(errs[i], "An image cannot be read; the list leaves it out", "id", id, "notLogged", left)
				}
			case limit > 0 && len(found) == limit:
				return found, last, nil
			default:
				found, last = append(found, ones[i]), id
			}
		}
		ids = ids[n:]
	}
	return found, "", nil
}

// Of the images that a page needs, so many are read at once: a few more than are needed, since
// some may be no claims, and not so many that they take much memory.
const leastRead, mostRead = 16, 512

// readImages reads images, several at a time.
func readImages[T any](ids []string, read func(id string) (T, error)) ([]T, []error) {
	ones, errs := make([]T, len(ids)), make([]error, len(ids))
	image.Each(len(ids), func(i int) { ones[i], errs[i] = read(ids[i]) })
	return ones, errs
}
