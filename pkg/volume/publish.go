// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"fmt"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// PublishRequest asks for a claim at a target.
type PublishRequest struct {
	ID      string
	Staging string // where it is staged, or will be
	Target  string // absolute path below the kubelet's directory; its parent exists
	Use            // the same as for staging
	// TargetReadOnly forbids writing at this target. Other targets may be writable.
	TargetReadOnly bool
}

// access is what the target allows.
func (r PublishRequest) access() image.Access {
	a := r.Access
	a.ReadOnly = a.ReadOnly || r.TargetReadOnly
	return a
}

// PublishClaim mounts a claim at a target, or finds it there. It stages the claim first if
// it is not staged, for example after a reboot that the container orchestrator has not
// noticed.
//
// Errors are those of [Manager.Stage]. [errdefs.ErrExists] also means that the claim is
// there with other mount options. [errdefs.ErrState] also means that the claim may have one
// target only, and has another, or that its filesystem gave up after an error and a pod
// still has it.
func (m *Manager) PublishClaim(ctx context.Context, r PublishRequest) (err error) {
	rel, err := m.root.Rel(r.Target)
	if err != nil {
		return err
	}
	unlock, err := m.locks.volume(r.ID)
	if err != nil {
		return err
	}
	defer unlock()
	img, err := m.openUsable(r.ID, r.Use)
	if err != nil {
		return err
	}
	defer img.Close()
	at, err := m.root.Inspect(rel, img.Mode())
	if err != nil {
		return err
	}
	if at.Mounted {
		there, err := m.mountedAt(img, rel)
		if err != nil {
			return err
		}
		if there.Complete {
			if err := compareAccess(img, there.Access, r); err != nil {
				return err
			}
			return m.checkAlive(img, rel, there)
		}
		if err := m.root.Unmount(img, rel); err != nil {
			return err
		}
	}
	// This check comes after the one whether the claim is at this target already: kubelet
	// binds that mount elsewhere as well, for subPath and for block devices.
	if r.SingleTarget {
		if err := m.checkSingleTarget(img, rel, r.Staging); err != nil {
			return err
		}
	}
	if err := m.stage(ctx, img, r.Staging, r.Access); err != nil {
		return err
	}
	var made undo
	defer func() { made.on(&err) }()
	target, undoTarget, err := m.root.Make(rel, img.Mode(), at)
	made.add(undoTarget)
	if err != nil {
		return err
	}
	defer target.Close()
	return m.bind(img, target, rel, r)
}

// checkSingleTarget returns [errdefs.ErrState] while a claim is published at another target.
func (m *Manager) checkSingleTarget(img *image.Image, rel, staging string) error {
	stagingRel, err := m.stagingRel(staging)
	if err != nil {
		return err
	}
	var loops []int
	if img.Mode() != image.ModeDiskImage {
		if loops, err = loopdev.Known(img.File); err != nil {
			return err
		}
	}
	return m.root.CheckOnlyAt(img, loops, "another pod has it, and its access mode allows one at a time: delete that pod first", rel, stagingRel)
}

// compareAccess returns [errdefs.ErrExists] if a target has other mount options than the
// request asks for.
func compareAccess(img *image.Image, is image.Access, r PublishRequest) error {
	asked := r.access()
	if img.Mode() != image.ModeFilesystem { // the other options are fixed
		is = image.Access{ReadOnly: is.ReadOnly, Context: is.Context}
		asked = image.Access{ReadOnly: asked.ReadOnly, Context: asked.Context}
	}
	if is == asked {
		return nil
	}
	return fmt.Errorf("%w: volume %s has the mount options %s, and %s are asked for; delete its pod first: it is published at %q", errdefs.ErrExists, img.ID(), is, asked, r.Target)
}

// bind mounts a staged claim on its target.
func (m *Manager) bind(img *image.Image, target *os.File, rel string, r PublishRequest) error {
	switch img.Mode() {
	case image.ModeDiskImage:
		return m.mounts.disk(img, target, rel, r.access())
	case image.ModeBlock:
		return m.bindNode(img, target, r.access().ReadOnly)
	}
	staging, err := m.stagingRel(r.Staging)
	if err != nil {
		return err
	}
	what, err := m.root.OpenMounted(staging)
	if err != nil {
		return err
	}
	defer what.Close()
	mnt, err := mount.Clone(what)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if err := mnt.SetAttr(r.access().Attr()); err != nil {
		return err
	}
	return mnt.Attach(target)
}

// bindNode mounts the node of a block volume's device on a target.
func (m *Manager) bindNode(img *image.Image, target *os.File, readOnly bool) error {
	dev, err := m.devices.Block(img, readOnly)
	if err != nil {
		return err
	}
	defer dev.Close()
	mnt, err := mount.CloneNode(dev.Path())
	if err != nil {
		return err
	}
	defer mnt.Close()
	return mnt.Attach(target)
}
