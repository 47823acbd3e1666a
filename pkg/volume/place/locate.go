// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Locate returns, relative to the root, the path where a volume is staged or published. If
// the volume is not at that path, it returns [errdefs.ErrNotFound].
func (r *Root) Locate(img *image.Image, path string) (string, error) {
	rel, err := r.Rel(path)
	if err != nil {
		return "", fmt.Errorf("%w: volume %s is not at %q (%w)", errdefs.ErrNotFound, img.ID(), path, err)
	}
	at, err := r.Inspect(rel, img.Mode())
	if img.Mode() == image.ModeBlock && errors.Is(err, errdefs.ErrInvalid) {
		// Kubelet may ask with the staging path, which is an empty directory for a block
		// volume.
		return rel, r.checkAttached(img, rel)
	}
	if err != nil && !errors.Is(err, errdefs.ErrInvalid) {
		return "", err
	}
	if err != nil {
		return "", fmt.Errorf("%w (%w)", r.notAt(img, rel), err)
	}
	if !at.Mounted {
		return "", r.notAt(img, rel)
	}
	if _, err := r.Identify(img, rel); errors.Is(err, ErrForeign) {
		return "", fmt.Errorf("%w (%w)", r.notAt(img, rel), err)
	} else if err != nil {
		return "", err
	}
	return rel, nil
}

// checkAttached returns [errdefs.ErrNotFound] unless the path is a directory, as every
// staging path is, and the volume is attached.
func (r *Root) checkAttached(img *image.Image, rel string) error {
	dir, err := r.OpenDir(rel)
	if isPathError(err) {
		return fmt.Errorf("%w (%w)", r.notAt(img, rel), err)
	}
	if err != nil {
		return err
	}
	dir.Close()
	loops, err := loopdev.Known(img.File)
	if err == nil && len(loops) == 0 {
		err = r.notAt(img, rel)
	}
	return err
}

func (r *Root) notAt(img *image.Image, rel string) error {
	return fmt.Errorf("%w: volume %s is not at %q", errdefs.ErrNotFound, img.ID(), r.Path(rel))
}
