// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// InlineRequest asks for an inline volume, published.
type InlineRequest struct {
	ID     string
	Target string // absolute path below the kubelet's directory; its parent exists
	Spec   diskfs.Spec
	Mode   image.Mode
	image.Access
	image.Lineage
	Pod image.Pod
	// Durability is what the pod asks for; empty leaves it to the operator, for a volume that
	// exists to the operator at the time when it was made.
	Durability image.Durability
}

// Validate checks a request without looking at the node. Errors are [errdefs.ErrInvalid]
// and those of [diskfs.Spec.Validate].
func (r InlineRequest) Validate() error {
	if err := image.CheckID(r.ID); err != nil {
		return err
	}
	if !slices.Contains(image.MountModes, r.Mode) {
		return fmt.Errorf("%w: publishAs %q: must be one of %s", errdefs.ErrInvalid, r.Mode, ModeList(image.MountModes))
	}
	if r.Durability != "" {
		if _, err := image.ParseDurability(string(r.Durability)); err != nil {
			return fmt.Errorf("%w: durability %w", errdefs.ErrInvalid, err)
		}
	}
	if r.Durability.DropsFlushes() && r.Mode == image.ModeDiskImage {
		return fmt.Errorf("%w: durability %q: is for publishAs %s, and not for %s, where the VM decides by the cache mode of its disk; "+
			"leave durability out", errdefs.ErrInvalid, r.Durability, image.ModeFilesystem, r.Mode)
	}
	if err := checkLineage(r.Lineage, r.Spec, r.Mode, r.ReadOnly, "volume attribute"); err != nil {
		return err
	}
	if r.Spec.Content != "" || r.From != "" { // which decides what is left open
		return diskfs.CheckContent(r.Spec.Content)
	}
	return r.Spec.Validate()
}

// record is the record that the volume's image gets.
func (r InlineRequest) record() image.Record {
	return image.Record{
		ID: r.ID, Spec: r.Spec, Mode: r.Mode, Target: r.Target, Access: r.Access, Lineage: r.Lineage, Pod: r.Pod, Durability: r.Durability,
	}
}

// ModeList lists modes for a message.
func ModeList(modes []image.Mode) string {
	var words []string
	for _, m := range modes {
		words = append(words, string(m))
	}
	return strings.Join(words, ", ")
}

// PublishInline makes an inline volume and mounts it at its target, or finds the same volume
// there. If it fails, it leaves nothing that it made. An image that an earlier publish made
// stays for the next one.
//
// Errors are [errdefs.ErrInvalid], [errdefs.ErrExists], [errdefs.ErrState],
// [errdefs.ErrBusy], [diskfs.ErrOutOfRange] and [errdefs.ErrLimit] for a volume that
// [quota.Limits] do not allow, what [template.Store.Ensure] returns, [pool.ErrFull], or the
// kernel's.
func (m *Manager) PublishInline(ctx context.Context, r InlineRequest) (res Result, err error) {
	if err := r.Validate(); err != nil {
		return res, err
	}
	if err := checkContext(r.Access); err != nil {
		return res, err
	}
	rel, err := m.root.Rel(r.Target)
	if err != nil {
		return res, err
	}
	unlock, err := m.locks.volume(r.ID)
	if err != nil {
		return res, err
	}
	defer unlock()
	// Look at the target before making anything, since that may take a VM.
	at, err := m.root.Inspect(rel, r.Mode)
	if err != nil {
		return res, err
	}
	var made undo
	defer func() { made.on(&err) }()
	defer func() {
		if err == nil && !res.Existed {
			m.made(r.ID, res)
		}
	}()

	var vol open
	defer func() { vol.close() }()
	vol.img, err = m.resume(r, at)
	switch {
	case err == nil:
		res.Existed, res.Durability = true, vol.img.Record.Durability
		if at.Mounted {
			there, err := m.mountedAt(vol.img, rel)
			if err != nil {
				return res, err
			}
			if there.Complete {
				return res, m.checkAlive(vol.img, rel, there)
			}
			if err := m.root.Unmount(vol.img, rel); err != nil {
				return res, err
			}
		}
		// An earlier publish died half-way and left its image: go on from there.
	case errors.Is(err, errdefs.ErrNotFound):
		var from *golden.Golden
		if r.Spec, from, err = m.start(r.Lineage, r.Spec, r.Mode, r.Pod.Namespace); err != nil {
			return res, err
		}
		defer from.Close()
		if err := m.quota.CheckSize(r.Spec.Size); err != nil {
			return res, err
		}
		if at.Mounted {
			return res, fmt.Errorf("%w: something else is mounted where the volume belongs; have the operator unmount it: %q", errdefs.ErrExists, r.Target)
		}
		if vol, res, err = m.makeInline(ctx, r, from); err != nil {
			return res, err
		}
		made.add(func() error { return m.removeInline(r.ID) })
	default:
		return res, err
	}

	target, undoTarget, err := m.root.Make(rel, r.Mode, at)
	made.add(undoTarget)
	if err != nil {
		return res, err
	}
	defer target.Close()
	if r.Mode == image.ModeDiskImage {
		return res, m.mounts.disk(vol.img, target, rel, r.Access)
	}
	if err := m.mount(&vol, r.Access); err != nil {
		return res, err
	}
	return res, m.attach(vol.img, vol.root, target, rel)
}

// mount mounts a volume at no path yet, or gives the mount that it has the attributes of an access.
func (m *Manager) mount(vol *open, access image.Access) (err error) {
	if vol.root == nil {
		vol.root, err = m.detached(vol.img, access)
		if err == nil {
			err = growStarted(vol, access)
		}
		return err
	}
	if access == (image.Access{}) { // as it was mounted
		return nil
	}
	return vol.root.SetAttr(access.Attr())
}

// makeInline makes the image of an inline volume, if the limits and the pool's space allow.
func (m *Manager) makeInline(ctx context.Context, r InlineRequest, from *golden.Golden) (open, Result, error) {
	release, err := m.quota.Reserve(r.ID, r.Pod.Namespace, r.Spec.Size)
	if err != nil {
		return open{}, Result{}, err
	}
	defer release()
	if err := m.space.AdmitInline(); err != nil {
		return open{}, Result{}, err
	}
	record := r.record()
	record.Durability, record.Lost = m.durabilityOf(r), m.losses.of(r.ID)
	vol, res, err := m.contents.newImage(ctx, record, from)
	res.Durability = record.Durability
	if err != nil {
		return open{}, res, err
	}
	if err := m.growNew(ctx, vol); err != nil {
		vol.close()
		return open{}, res, err
	}
	if err := m.images.Link(vol.img); err != nil {
		vol.close()
		return open{}, res, err
	}
	m.quota.Settle(r.ID)
	return vol, res, nil
}

// removeInline removes the name of an inline volume's image.
func (m *Manager) removeInline(id string) error {
	if err := m.images.Remove(id); err != nil {
		return err
	}
	m.quota.Forget(id)
	return nil
}

// resume opens the image that an earlier publish of the same volume left. If there is none, or
// it is torn or may be, resume returns [errdefs.ErrNotFound]. If the volume differs from what
// is asked for, it returns the error of [InlineRequest.compare].
func (m *Manager) resume(r InlineRequest, at place.Spot) (_ *image.Image, err error) {
	img, err := m.images.Open(r.ID)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			img.Close()
		}
	}()
	if err := r.compare(img.Record); err != nil {
		return nil, err
	}
	if at.Mounted {
		return img, nil
	}
	whole, err := m.isWhole(img)
	if err != nil {
		return nil, err
	}
	if whole {
		return img, nil
	}
	if err := m.removeInline(r.ID); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, r.ID)
}

// isWhole reports whether the image of a volume that is not mounted has all its content, and
// logs what took it if not.
func (m *Manager) isWhole(img *image.Image) (bool, error) {
	if other, err := img.Record.OfAnotherBoot(); err != nil {
		return false, err
	} else if other {
		m.losses.note(img.ID(), img.Record.Created)
		logs.Warn("The node has rebooted since a volatile volume was made; making it again, without what it held",
			"volume", img.ID(), "made", img.Record.Created.Format(time.RFC3339))
		return false, nil
	}
	torn, err := img.Torn()
	if torn {
		logs.Warn("A power cut took the content of a volume; making it again", "volume", img.ID())
	}
	return !torn, err
}

// Unpublish unmounts a volume from its target, and deletes it if it is inline. A volume
// that is not there is fine, because the call may be a repetition. A mount at the target
// that is not the volume's stays, and returns [errdefs.ErrState].
func (m *Manager) Unpublish(id, target string) error {
	if err := image.CheckID(id); err != nil {
		return err
	}
	rel, err := m.root.Rel(target)
	if err != nil {
		return err
	}
	unlock, err := m.locks.volume(id)
	if err != nil {
		return err
	}
	defer unlock()
	m.losses.forget(id)
	img, err := m.images.Open(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return m.unpublishLost(id, rel)
	}
	if err != nil {
		return err
	}
	if img.Record.Lifecycle == image.Inline {
		return m.unpublishInline(img, target, rel)
	}
	defer img.Close()
	if _, err := m.root.Clear(img, rel); err != nil {
		return err
	}
	m.root.Clean(rel, img.Mode())
	return nil
}

// unpublishInline unmounts an inline volume and removes its image. The filesystem in it ends
// after that, and after the call: see [endings].
func (m *Manager) unpublishInline(img *image.Image, target, rel string) error {
	if img.Record.Target != target {
		return img.Close() // the volume is at another target, and stays there
	}
	was, err := m.root.Take(img, rel)
	kept := false
	if err == nil {
		m.root.Clean(rel, img.Mode())
		if kept = m.commits.keep(img, was.Root); kept {
			m.quota.Forget(img.ID())
		} else {
			err = m.removeInline(img.ID())
		}
	}
	if err != nil { // the image stays, and so does what is in it
		if was.Root != nil {
			was.Root.Close()
		}
		img.Close()
		return err
	}
	if kept {
		m.endings.kept(img, was, func(unwritten error) { m.commits.begin(img.Record, unwritten) })
	} else {
		m.endings.volume(img, was)
	}
	return nil
}

// unpublishLost clears the target of a volume without an image.
func (m *Manager) unpublishLost(id, rel string) error {
	lost, err := m.root.Lost(m.images, id, rel)
	if err != nil {
		return err
	}
	if _, err := m.root.Clear(lost, rel); err != nil {
		return err
	}
	m.root.Clean(rel, lost.Mode())
	return nil
}
