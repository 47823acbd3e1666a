// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Content is what a request with a content needs to know of it.
type Content struct {
	Disk bool  // it is a whole disk, and not the files of a filesystem
	Size int64 // bytes, of a volume that asks for no size; 0 leaves that to the filesystem
}

// given completes the spec of a new volume: filesystem and size, where the request leaves them to the
// content. It asks [Config].Content whether the namespace may use the content. Errors are those of that,
// and [errdefs.ErrInvalid] for a content that does not go with the request.
func (m *Manager) given(spec diskfs.Spec, mode image.Mode, namespace string) (diskfs.Spec, error) {
	if spec.Content == "" {
		return spec, nil
	}
	c, err := m.content(spec.Content, namespace)
	if err != nil {
		return spec, err
	}
	if c.Disk {
		return c.disk(spec, mode)
	}
	return c.files(spec)
}

// disk completes the spec of a volume whose content is a whole disk.
func (c Content) disk(spec diskfs.Spec, mode image.Mode) (diskfs.Spec, error) {
	if mode == image.ModeFilesystem {
		return spec, fmt.Errorf("%w: content %s: it is a whole disk, and cannot be mounted; ask for publishAs %s, or a claim with volumeMode Block",
			errdefs.ErrInvalid, spec.Content, image.ModeDiskImage)
	}
	unset := spec.Filesystem == "" || spec.IsDisk() ||
		mode == image.ModeDiskImage && spec.Filesystem == diskfs.Default // the provisioner's, for want of another
	if !unset || spec.Label != "" || len(spec.Options) > 0 {
		return spec, fmt.Errorf("%w: content %s: it is a whole disk, with filesystems of its own; leave out format, fsType, label and format options",
			errdefs.ErrInvalid, spec.Content)
	}
	spec.Filesystem, spec.Size = diskfs.Disk, cmp.Or(spec.Size, c.Size)
	if spec.Size == 0 {
		return spec, fmt.Errorf("%w: size: must be given for a volume with the content %s", errdefs.ErrInvalid, spec.Content)
	}
	return spec, spec.Validate()
}

// files completes the spec of a volume whose content is files.
func (c Content) files(spec diskfs.Spec) (diskfs.Spec, error) {
	if spec.IsDisk() {
		return spec, fmt.Errorf("%w: content %s: it is files, and needs a filesystem; set the parameter format", errdefs.ErrInvalid, spec.Content)
	}
	spec.Filesystem = cmp.Or(spec.Filesystem, diskfs.Default)
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return spec, err
	}
	spec.Size = cmp.Or(spec.Size, c.Size, fs.DefaultSize())
	return spec, spec.Validate()
}

// content asks for a content that a namespace wants to use.
func (m *Manager) content(name, namespace string) (Content, error) {
	if m.contentOf == nil {
		return Content{}, fmt.Errorf("%w: content %.64q: this node has no contents; the operator names them with --contents", errdefs.ErrInvalid, name)
	}
	return m.contentOf(name, namespace)
}

// asHave returns the spec of a request for a volume that exists. What the request leaves to its content or golden is
// as it was decided then: the operator may have changed or removed the content since, and the golden may have another
// generation.
func asHave(asked, have diskfs.Spec, l image.Lineage) diskfs.Spec {
	if l.From != "" {
		asked.Content, asked.Label = have.Content, cmp.Or(asked.Label, have.Label)
		if len(asked.Options) == 0 {
			asked.Options = have.Options
		}
	}
	if asked.Content != have.Content {
		return asked
	}
	asked.Filesystem = cmp.Or(asked.Filesystem, have.Filesystem)
	asked.Size = cmp.Or(asked.Size, have.Size)
	return asked
}

// checkHolds returns [diskfs.ErrOutOfRange] for a volume that is smaller than the disk it begins with.
func checkHolds(spec diskfs.Spec, disk int64) error {
	if spec.Size >= disk {
		return nil
	}
	return fmt.Errorf("%w: the disk of content %s has %s, and the volume %s; ask for at least that",
		diskfs.ErrOutOfRange, spec.Content, size.Format(disk), size.Format(spec.Size))
}
