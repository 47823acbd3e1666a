// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Slack is what a disk.img of the given size may take beyond its data, in bytes: what xfs needs to
// find them, and what it allocates in advance.
//
// An extent takes 16 bytes in a block that may be half empty. With one extent for each 4 KiB that
// is 1/125 of the size. When shared blocks are written to, xfs takes new space in pieces of 128 KiB
// (XFS_DEFAULT_COWEXTSZ_HINT), and templates have some tens of extents.
func Slack(bytes int64) int64 { return bytes/64 + 32*size.MiB }

// bound is the space that a disk.img may take, in bytes.
//
// Until new data are on disk, blocks that the image shares are counted beside those that replace
// them. An inline volume shares what it has from its template. A snapshot can share all of a claim
// at any time.
func bound(r Record, allocated int64) int64 {
	shared := r.Spec.Size
	if r.Lifecycle == Inline {
		shared = min(shared, allocated)
	}
	return r.Spec.Size + shared + Slack(r.Spec.Size)
}

// Bound makes the kernel bound the space of a disk.img, where it can. It is called before a pod
// gets the image. Images of other modes have no consumer who could make them larger.
func (s *Store) Bound(img *Image) error { return s.boundAs(img, img.Record) }

// boundAs is [Store.Bound] for the record that the image is about to get.
func (s *Store) boundAs(img *Image, r Record) error {
	if r.Mode != ModeDiskImage {
		return nil
	}
	if can, err := s.pool.CanBound(); err != nil || !can {
		return err
	}
	allocated, err := img.Allocated()
	if err != nil {
		return err
	}
	err = s.pool.Bound(img.File, bound(r, allocated))
	if errors.Is(err, pool.ErrProjectTaken) {
		logs.Warn("The space of a disk.img is not bounded by the kernel", "err", err, "volume", r.ID)
		return nil
	}
	return err
}
