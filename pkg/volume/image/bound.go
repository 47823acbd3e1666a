// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import "github.com/csi-disktemplate/csi-disktemplate/pkg/size"

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
// gets the image. Images of other modes have no consumer who could make them larger. It returns
// [pool.ErrProjectTaken] for an image that can be used and has no bound.
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
	return s.pool.Bound(img.File, bound(r, allocated))
}

// LostBound reports whether a disk.img has no bound where the kernel could keep one: its pod has
// taken it out, or an older plugin has published it.
func (s *Store) LostBound(img *Image) (bool, error) {
	if can, err := s.pool.CanBound(); err != nil || !can {
		return false, err
	}
	bounded, err := s.pool.Bounded(img.File)
	return !bounded, err
}

// TooLarge reports whether a disk.img takes more space than its bound is, or would be. It can
// without being too long: space may be reserved behind the end of a file (fallocate(2),
// FALLOC_FL_KEEP_SIZE).
func (img *Image) TooLarge() (bool, error) {
	allocated, err := img.Allocated()
	return allocated > bound(img.Record, img.Record.Spec.Size), err
}
