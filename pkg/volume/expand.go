// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// To expand a volume (CSI's word), the plugin resizes its image and its device, and grows the
// filesystem in it (growth.go).

// Size is a range of sizes, in bytes.
type Size struct {
	Required int64 // at least; 0 means any size
	Limit    int64 // at most; 0 means no limit
}

// Expand makes a claim at least as large as is required, durably, and returns its size and
// mode then. It never makes a claim smaller.
//
// It enlarges the image, and what the pool promises. The attached device and the filesystem
// on it follow in [Manager.ExpandOnNode], or when the claim is staged the next time.
//
// Errors are [errdefs.ErrInvalid] for a use that the claim does not have,
// [errdefs.ErrNotFound], [diskfs.ErrOutOfRange], [pool.ErrFull], [errdefs.ErrBusy],
// [errdefs.ErrUnderWay] while the claim is being copied or grown, or the kernel's.
func (m *Manager) Expand(id string, want Size, use *Use) (int64, image.Mode, error) {
	unlock, err := m.locks.volume(id)
	if err != nil {
		return 0, "", err
	}
	defer unlock()
	img, err := m.openExpandable(id, use)
	if err != nil {
		return 0, "", err
	}
	defer img.Close()
	err = m.expand(img, want)
	return img.Record.Spec.Size, img.Mode(), err
}

// openExpandable opens a claim. It returns [errdefs.ErrInvalid] if use is not nil and the
// claim cannot be used that way.
func (m *Manager) openExpandable(id string, use *Use) (*image.Image, error) {
	img, err := m.images.OpenClaim(id)
	if err != nil || use == nil {
		return img, err
	}
	if err := supports(img.Record, *use, errdefs.ErrInvalid); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

func (m *Manager) expand(img *image.Image, want Size) error {
	spec := img.Record.Spec
	has := spec.Size
	spec.Size = max(has, diskfs.RoundUp(want.Required))
	if want.Limit > 0 && has > want.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: volume %s has %s, and volumes do not shrink; copy its content into a smaller one",
			diskfs.ErrOutOfRange, want.Limit, img.ID(), size.Format(has))
	}
	if want.Limit > 0 && spec.Size > want.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: volume %s would have %s, since sizes are whole Mi; raise the limit",
			diskfs.ErrOutOfRange, want.Limit, img.ID(), size.Format(spec.Size))
	}
	if spec.Size == has {
		return nil
	}
	if err := spec.Validate(); err != nil {
		return fmt.Errorf("size: %w", err)
	}
	release, err := m.space.Admit(space.Claim("", spec.Size-has, img.Record.Provisioning))
	if err != nil {
		return err
	}
	defer release()
	unlock, err := m.images.Exclusive(m.work.ctx, img, place.SettleTime)
	if err != nil {
		return err
	}
	defer unlock()
	return m.images.Resize(img, spec.Size)
}

// ExpandOnNode makes a claim that is in use at a path as large as is required: its image if
// need be, its device, and its filesystem. It returns the claim's size.
//
// Errors are those of [Manager.Expand]. [errdefs.ErrNotFound] also means that the claim is
// not at that path. [errdefs.ErrState] means that the filesystem cannot grow while it is
// mounted, or gave up after an error, and grows when it is staged the next time.
func (m *Manager) ExpandOnNode(id, path string, want Size, use *Use) (int64, error) {
	unlock, err := m.locks.volume(id)
	if err != nil {
		return 0, err
	}
	defer unlock()
	img, err := m.openExpandable(id, use)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	rel, err := m.root.Locate(img, path)
	if err != nil {
		return 0, err
	}
	if err := m.expand(img, want); err != nil {
		return 0, err
	}
	has := img.Record.Spec.Size
	if img.Mode() == image.ModeDiskImage {
		return has, nil
	}
	if err := device.UpdateSize(img); err != nil {
		return 0, err
	}
	if img.Mode() == image.ModeBlock {
		return has, nil
	}
	there, err := m.mountedAt(img, rel)
	if err == nil {
		err = m.checkAlive(img, rel, there)
	}
	if err != nil {
		return 0, err
	}
	return has, m.growth.inUse(img, rel)
}
