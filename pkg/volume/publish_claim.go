// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// PublishRequest asks for a persistent volume at a target.
type PublishRequest struct {
	ID      string
	Staging string // where it is staged, or will be
	Target  string // absolute path below the kubelet's directory; its parent exists
	Use            // as it is staged
	// TargetReadOnly forbids writing at this target, whatever others may.
	TargetReadOnly bool
}

// access is what the target allows.
func (r PublishRequest) access() Access {
	a := r.Access
	a.ReadOnly = a.ReadOnly || r.TargetReadOnly
	return a
}

// PublishClaim shows a persistent volume at a target, or finds it there. It stages
// the volume first if it is not, as after a reboot that the container orchestrator
// has not noticed.
//
// Errors are those of [Manager.Stage]; ErrExists also means that the volume is
// there with another access, ErrState that it is at another target and may have
// one only.
func (m *Manager) PublishClaim(ctx context.Context, r PublishRequest) (err error) {
	rel, err := m.relative(r.Target)
	if err != nil {
		return err
	}
	img, err := m.openUsable(r.ID, r.Use)
	if err != nil {
		return err
	}
	defer img.Close()
	at, err := m.look(rel, img.Mode)
	if err != nil {
		return err
	}
	if at.mounted {
		there, err := m.alreadyShown(img, rel)
		if err != nil {
			return err
		}
		if there.whole {
			return img.sameAccess(there.access, r.access(), r.Target)
		}
		if err := m.unmount(img, rel); err != nil {
			return err
		}
	}
	// After what is there was found to be right: kubelet binds it elsewhere as well,
	// for subPath and for block devices.
	if r.SingleTarget {
		if err := m.nowhereElse(img, rel, r.Staging); err != nil {
			return err
		}
	}
	if err := m.stage(ctx, img, r.Staging, r.Access); err != nil {
		return err
	}
	var made undo
	defer func() { made.unless(&err) }()
	target, err := m.newTarget(rel, img.Mode, at, &made)
	if err != nil {
		return err
	}
	defer target.Close()
	return m.show(img, target, rel, r)
}

// nowhereElse is ErrState while a volume is published at another target.
func (m *Manager) nowhereElse(img *image, rel, staging string) error {
	stagingRel, err := m.relative(staging)
	if err != nil {
		return fmt.Errorf("staging_target_path: %w", err)
	}
	places, err := m.places(img)
	if err != nil {
		return err
	}
	for _, at := range places {
		if at != filepath.Join(m.mountPath, rel) && at != filepath.Join(m.mountPath, stagingRel) {
			return fmt.Errorf("%w: volume %s is published at %s; with this access mode it has one target at a time: unpublish it there first", ErrState, img.ID, at)
		}
	}
	return nil
}

// sameAccess is ErrExists if a target allows something else than is asked for.
func (img *image) sameAccess(is, asked Access, target string) error {
	if img.Mode != ModeFilesystem { // the rest is fixed
		is, asked = Access{ReadOnly: is.ReadOnly}, Access{ReadOnly: asked.ReadOnly}
	}
	if is == asked {
		return nil
	}
	return fmt.Errorf("%w: volume %s is published at %q as %s, asked for %s; unpublish it first", ErrExists, img.ID, target, is, asked)
}

// show mounts a staged volume on its target.
func (m *Manager) show(img *image, target *os.File, rel string, r PublishRequest) error {
	var what *os.File
	switch img.Mode {
	case ModeDiskImage:
		return m.showImage(img, target, rel, r.access())
	case ModeBlock:
		dev, err := m.device(img, r.access().ReadOnly)
		if err != nil {
			return err
		}
		defer dev.Close()
		what = dev.File()
	case ModeFilesystem:
		staging, err := m.relative(r.Staging)
		if err != nil {
			return err
		}
		if what, err = m.openMounted(staging); err != nil {
			return err
		}
		defer what.Close()
	}
	mnt, err := mount.Clone(what)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if img.Mode == ModeFilesystem {
		if err := mnt.SetAttr(r.access().attr()); err != nil {
			return err
		}
	}
	return mnt.Attach(target)
}
