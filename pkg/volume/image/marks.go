// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// An image may have marks besides its record, each in an attribute of its own: that this plugin
// froze its filesystem, where a block volume is staged, and that all of a filesystem was written.

// MarkFrozen notes that this plugin is about to freeze the volume's filesystem.
func (img *Image) MarkFrozen() error {
	return pool.SetRecord(img.File, pool.FrozenAttr, time.Now().UTC())
}

// UnmarkFrozen removes the mark. A missing mark is fine.
func (img *Image) UnmarkFrozen() error { return pool.RemoveRecord(img.File, pool.FrozenAttr) }

// Frozen returns since when the image has the mark. frozen is false if it has none.
func (img *Image) Frozen() (since time.Time, frozen bool, err error) {
	frozen, err = img.mark(pool.FrozenAttr, &since)
	return since, frozen, err
}

// MarkWritten notes that everything in the volume's filesystem was written to the image, and that it is unmounted
// or about to be.
func (img *Image) MarkWritten() error { return pool.SetRecord(img.File, pool.WrittenAttr, true) }

// UnmarkWritten removes the mark. A missing mark is fine.
func (img *Image) UnmarkWritten() error { return pool.RemoveRecord(img.File, pool.WrittenAttr) }

// Written reports whether the image has the mark.
func (img *Image) Written() (written bool, err error) {
	_, err = img.mark(pool.WrittenAttr, &written)
	return written, err
}

// MarkStaged notes the staging path of a block volume. Without the mark nobody could tell
// where the volume is staged: nothing is mounted there, and its device does not say.
func (img *Image) MarkStaged(path string) error {
	return pool.SetRecord(img.File, pool.StagedAttr, path)
}

// UnmarkStaged removes the mark. A missing mark is fine.
func (img *Image) UnmarkStaged() error { return pool.RemoveRecord(img.File, pool.StagedAttr) }

// Staged is the path where a block volume is staged. staged is false if the mark is missing.
func (img *Image) Staged() (path string, staged bool, err error) {
	staged, err = img.mark(pool.StagedAttr, &path)
	return path, staged, err
}

func (img *Image) mark(attr pool.Attr, value any) (bool, error) {
	err := pool.GetRecord(img.File, attr, value)
	if errors.Is(err, pool.ErrNoRecord) {
		return false, nil
	}
	return err == nil, err
}
