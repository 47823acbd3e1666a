// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// Health returns what is wrong with a volume. It looks at the image, at its devices, and at
// where it is mounted: at the first of the paths where it is, or, if it is at none of them,
// anywhere.
//
// A volume whose image is gone returns [errdefs.ErrNotFound], unless it is still mounted at
// one of the paths.
func (m *Manager) Health(id string, paths ...string) ([]health.Condition, error) {
	if err := image.CheckID(id); err != nil {
		return nil, err
	}
	img, err := m.images.Open(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		if gone, e := m.mountedWithoutImage(id, paths); e != nil || gone != "" {
			return []health.Condition{{
				Code: "BackingImageMissing", Severity: health.DataLoss,
				Text:   fmt.Sprintf("the image of volume %s was deleted, and the volume is still mounted at %s", id, gone),
				Remedy: "copy the data from there now: it is lost when the volume is unmounted",
			}}, e
		}
	}
	if err != nil {
		return nil, err
	}
	defer img.Close()
	conditions, err := m.imageConditions(img)
	if err != nil {
		return nil, err
	}
	if img.Mode() != image.ModeDiskImage {
		more, err := m.deviceConditions(img, paths)
		if err != nil {
			return nil, err
		}
		conditions = append(conditions, more...)
	}
	if img.Record.Provisioning.NeedsFreeSpace() {
		conditions = append(conditions, m.PoolHealth()...)
	}
	return conditions, nil
}

// VolumeHealth is what is wrong with a claim.
type VolumeHealth struct {
	ID         string
	Conditions []health.Condition
}

// ListHealth lists the claims that have something wrong with them, as [Manager.ListClaims] lists
// claims.
func (m *Manager) ListHealth(after string, limit int) ([]VolumeHealth, string, error) {
	ids, err := m.pool.Volumes()
	if err != nil {
		return nil, "", err
	}
	return page(ids, after, limit, &m.unread, func(id string) (VolumeHealth, error) {
		if _, err := m.images.GetClaim(id); err != nil {
			return VolumeHealth{}, err
		}
		found, err := m.Health(id)
		if err == nil && len(found) == 0 {
			err = fmt.Errorf("%w: nothing is wrong with volume %s", errdefs.ErrNotFound, id)
		}
		return VolumeHealth{id, found}, err
	})
}

func (m *Manager) imageConditions(img *image.Image) ([]health.Condition, error) {
	found := lossConditions(img.Record)
	if err := img.CheckLength(); errors.Is(err, errdefs.ErrState) {
		found = append(found, health.Condition{Code: "BackingImageTruncated", Severity: health.DataLoss, Text: err.Error()})
	} else if err != nil {
		return nil, err
	}
	resized, err := diskConditions(img)
	if err != nil {
		return nil, err
	}
	found = append(found, resized...)
	missing, err := m.images.Unreserved(img)
	if err != nil {
		return nil, err
	}
	if missing > 0 {
		found = append(found, health.Condition{
			Code: "ReservationIncomplete", Severity: health.Degraded,
			Text:   fmt.Sprintf("%s of the %s of thick volume %s are not reserved at the moment", size.Format(missing), size.Format(img.Record.Spec.Size), img.ID()),
			Remedy: "the plugin reserves them again within minutes; if this condition stays, make room in the pool",
		})
	}
	return found, nil
}

// diskConditions compares the length and the space of a disk.img with its record. A pod can
// change the one and not the other. Another length may be meant, for example when a pod copies
// another image over it.
func diskConditions(img *image.Image) ([]health.Condition, error) {
	if img.Mode() != image.ModeDiskImage {
		return nil, nil
	}
	fi, err := img.File.Stat()
	if err != nil {
		return nil, err
	}
	large, err := img.TooLarge()
	if err != nil {
		return nil, err
	}
	emptied, err := img.Emptied()
	if err != nil {
		return nil, err
	}
	has, want := fi.Size(), img.Record.Spec.Size
	switch {
	case emptied:
		return []health.Condition{{
			Code: health.DiskImageEmptied, Severity: health.DataLoss,
			Text: fmt.Sprintf("the pod of volume %s made its disk.img %d bytes, so the disk of %s that was in it is gone: snapshots and clones are refused",
				img.ID(), has, size.Format(want)),
			Remedy: fmt.Sprintf("restore a snapshot, or, in the pod, write a disk into it again; for an empty one run truncate -s %d disk.img", want),
		}}, nil
	case has > want:
		return []health.Condition{{
			Code: health.DiskImageGrown, Severity: health.Degraded,
			Text: fmt.Sprintf("the pod of volume %s made its disk.img %s (%d bytes), larger than the volume's %s: snapshots and clones leave out the end, and it may take space that the pool promised to others",
				img.ID(), size.Format(has), has, size.Format(want)),
			Remedy: fmt.Sprintf("in the pod, run truncate -s %d disk.img if nothing is behind that, or %s", want, orElse(img.Record, has)),
		}}, nil
	case large:
		return []health.Condition{{
			Code: health.DiskImageGrown, Severity: health.Degraded,
			Text: fmt.Sprintf("the pod of volume %s reserved space behind the end of its disk.img, far more than the volume's %s: it is missing for others",
				img.ID(), size.Format(want)),
			Remedy: fmt.Sprintf("in the pod, run truncate -s %d disk.img, which returns the space", want),
		}}, nil
	case has < want:
		return []health.Condition{{
			Code: health.DiskImageShortened, Severity: health.Degraded,
			Text: fmt.Sprintf("the pod of volume %s made its disk.img %s (%d bytes), smaller than the volume's %s: in snapshots and clones the missing end reads as zeros",
				img.ID(), size.Format(has), has, size.Format(want)),
			Remedy: fmt.Sprintf("if that was not meant, for example when KubeVirt resized the disk of a VM, stop the VM and restore a snapshot; else, in the pod, run truncate -s %d disk.img", want),
		}}, nil
	}
	return nil, nil
}

// orElse is what to do with a disk.img whose end is needed, or whose pod cannot be told to cut it.
func orElse(r image.Record, has int64) string {
	if r.Lifecycle == image.Inline {
		return "delete the pod"
	}
	return fmt.Sprintf("expand the claim to at least %d bytes", has)
}

func (m *Manager) deviceConditions(img *image.Image, paths []string) ([]health.Condition, error) {
	loops, err := loopdev.Known(img.File)
	if err != nil {
		return nil, err
	}
	var found []health.Condition
	for _, index := range loops {
		if direct, err := loopdev.Direct(index); err == nil && !direct {
			found = append(found, health.Condition{
				Code: "DirectIOLost", Severity: health.Degraded,
				Text:   fmt.Sprintf("/dev/loop%d of volume %s does buffered I/O, which is many times slower and takes memory", index, img.ID()),
				Remedy: fmt.Sprintf("restart the pod; if this condition stays, check that the pool's filesystem has blocks of %d bytes", loopdev.BlockSize),
			})
			break // report each reason once
		}
	}
	if img.Mode() != image.ModeFilesystem {
		return found, nil
	}
	rel, err := m.someMount(img, loops, paths)
	if err != nil || rel == "" {
		return found, err
	}
	there, err := m.root.Identify(img, rel)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, errdefs.ErrState): // unmounted meanwhile
		return found, nil
	case errors.Is(err, place.ErrForeign): // something else covers it
		return found, nil
	case err != nil:
		return nil, err
	}
	gaveUp, err := m.gaveUp(img, rel, there)
	if errors.Is(err, os.ErrNotExist) { // unmounted meanwhile
		return found, nil
	}
	if err != nil || gaveUp == nil {
		return found, err
	}
	return append(found, *gaveUp), nil
}

// someMount returns where a volume is mounted, preferably at one of the paths, or "".
func (m *Manager) someMount(img *image.Image, loops []int, paths []string) (rel string, err error) {
	for _, path := range paths {
		if rel, err := m.root.Locate(img, path); err == nil {
			return rel, nil
		}
	}
	places, err := m.root.MountpointsOf(img, loops)
	if err != nil || len(places) == 0 {
		return "", err
	}
	return m.root.RelMounted(places[0])
}

// gaveUp looks at the filesystem of a volume that is mounted at a path. It returns nil if the
// filesystem does its work, or if the volume is a disk, whose content is its consumer's.
func (m *Manager) gaveUp(img *image.Image, rel string, there place.Mount) (*health.Condition, error) {
	if img.Mode() != image.ModeFilesystem {
		return nil, nil
	}
	is, err := m.root.Vitality(there, rel)
	if err != nil || is == place.Alive {
		return nil, err
	}
	c := &health.Condition{
		Code: "FilesystemReadOnly", Severity: health.Inaccessible,
		Text:   fmt.Sprintf("the kernel made the filesystem of volume %s read-only after an error (see dmesg)", img.ID()),
		Remedy: "make room in the pool if it is full, then delete all pods that have the volume: the next one gets the filesystem mounted anew, with everything that was synced",
	}
	if img.Record.Lifecycle == image.Inline {
		c.Remedy = "make room in the pool if it is full, then delete the pod: the next one gets a new volume"
	}
	if is == place.ShutDown {
		c.Code, c.Text = "FilesystemShutDown", fmt.Sprintf("the kernel shut down the filesystem of volume %s after an error (see dmesg)", img.ID())
	}
	return c, nil
}

// mountedWithoutImage returns the first of the paths where a volume without an image is
// still mounted, or "".
func (m *Manager) mountedWithoutImage(id string, paths []string) (string, error) {
	for _, path := range paths {
		rel, err := m.root.Rel(path)
		if err != nil {
			continue // not a path below kubelet's directory
		}
		lost, err := m.root.Lost(m.images, id, rel)
		if err != nil {
			return "", err
		}
		at, err := m.root.Inspect(rel, lost.Mode())
		if err != nil || !at.Mounted {
			continue
		}
		if there, err := m.root.Identify(lost, rel); err == nil && there.Device >= 0 {
			return m.root.Path(rel), nil
		}
	}
	return "", nil
}

// PoolHealth returns what is wrong with the pool. It is cheap: a few calls of stat(2) and
// statfs(2) for each layer.
func (m *Manager) PoolHealth() []health.Condition {
	if found := m.pool.Conditions(); found != nil {
		return found
	}
	return m.spaceConditions()
}

// spaceConditions say nothing of a pool that cannot be used.
func (m *Manager) spaceConditions() []health.Condition {
	if m.pool.Check() != nil {
		return nil
	}
	err := m.space.Check()
	switch {
	case errors.Is(err, pool.ErrFull):
		// Volumes that exist work, and deleting some is what helps: the plugin is ready for both.
		text, remedy := health.Advice(err)
		return []health.Condition{{
			Code: health.PoolFull, Severity: health.Degraded, StillReady: true,
			Text: text, Cost: "new volumes are refused, and those that exist work as long as they need no new space", Remedy: remedy,
		}}
	case err != nil:
		return []health.Condition{{Code: health.PoolUnusable, Severity: health.Inaccessible, Text: err.Error()}}
	}
	return nil
}

// Available is the size of the largest claim that can still be made, in bytes, a whole
// number of MiB.
func (m *Manager) Available(p image.Provisioning) (int64, error) { return m.space.Available(p) }

// Account is what the pool has promised.
func (m *Manager) Account() (space.Account, error) { return m.space.Account() }
