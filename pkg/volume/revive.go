// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// A filesystem gives up when its disk reports an error, for example because the pool is full.
// From then on it refuses writes, or everything, until its last mount is gone. A new mount
// before that shows the same broken filesystem. So whatever is handed to a pod is looked at
// first. A staged filesystem that no pod has is mounted anew. What a pod still has is never
// taken from it.

// checkAlive returns [errdefs.ErrState] if the filesystem of a volume that is mounted at a
// path gave up.
func (m *Manager) checkAlive(img *image.Image, rel string, there place.Mount) error {
	why, err := m.gaveUp(img, rel, there)
	if err != nil || why == nil {
		return err
	}
	users, err := m.root.Mountpoints(img)
	if err != nil {
		return err
	}
	return stillMounted(why, users)
}

// stillMounted is the error for a filesystem that gave up and is in use at these paths.
func stillMounted(why *health.Condition, users []string) error {
	const most = 3 // the error goes into an event of 1 KiB
	more := ""
	if len(users) > most {
		more = fmt.Sprintf(" and %d more", len(users)-most)
		users = users[:most]
	}
	return fmt.Errorf("%w: %s, and it is still mounted at %s%s: %s", errdefs.ErrState, why.Text, strings.Join(users, ", "), more, why.Remedy)
}

// reviveStaged looks at a filesystem that is staged. If it gave up, and no pod has it, it is
// unmounted and mounted anew. If a pod has it, reviveStaged returns [errdefs.ErrState].
func (m *Manager) reviveStaged(ctx context.Context, img *image.Image, rel string, there place.Mount, access image.Access) error {
	why, err := m.gaveUp(img, rel, there)
	if err != nil || why == nil {
		return err
	}
	users, err := m.root.Mountpoints(img)
	if err != nil {
		return err
	}
	staging := m.root.AsMounted(m.root.Path(rel))
	users = slices.DeleteFunc(users, func(at string) bool { return at == staging })
	if len(users) > 0 {
		return stillMounted(why, users)
	}
	logs.Warn("A staged filesystem gave up, and no pod has it: mounting it anew", "volume", img.ID(), "reason", why.Code)
	if _, err := m.root.Clear(img, rel); err != nil {
		return fmt.Errorf("%w: %s, and it cannot be unmounted to mount it anew: %w", errdefs.ErrState, why.Text, err)
	}
	if err := m.root.CheckUnused(img); errors.Is(err, errdefs.ErrState) {
		return m.keptElsewhere(img, why, there.Device)
	} else if err != nil {
		return err
	}
	if err := m.stageFilesystem(ctx, img, rel, access); err != nil {
		return fmt.Errorf("%s, and it cannot be mounted anew: %w", why.Text, err)
	}
	return nil
}

// keptElsewhere is the error for a filesystem that gave up, is not mounted below kubelet's
// directory any more, and is kept by something else on this loop device.
func (m *Manager) keptElsewhere(img *image.Image, why *health.Condition, device int) error {
	users, err := place.AllMountpoints(img, []int{device})
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return stillMounted(why, users)
	}
	return fmt.Errorf("%w: %s, and something that is not visible here still has it, for example a process in another mount namespace: find it with grep loop%d /proc/*/mountinfo, and end it",
		errdefs.ErrState, why.Text, device)
}

// detached mounts a volume at no path yet. If that fails while something that cannot be seen
// here keeps its filesystem, the error is [errdefs.ErrState] and says so: a filesystem that
// became read-only cannot be mounted writable.
func (m *Manager) detached(img *image.Image, access image.Access) (*mount.Detached, error) {
	mnt, err := m.mounts.detached(img, access)
	if err != nil && !img.Fresh {
		if held := m.root.CheckUnused(img); errors.Is(held, errdefs.ErrState) {
			err = fmt.Errorf("%w (%w)", held, err)
		}
	}
	return mnt, err
}

// attach puts a volume's new mount on its target. If the image is not fresh, its filesystem
// may have given up earlier, and something that cannot be seen here, for example in another
// mount namespace, may keep it alive. The new mount shows that filesystem, so it is taken away
// again, and attach returns [errdefs.ErrState].
func (m *Manager) attach(img *image.Image, mnt *mount.Detached, target *os.File, rel string) error {
	if err := mnt.Attach(target); err != nil || img.Fresh {
		return err
	}
	if img.Synced {
		return m.checkReady(img, mnt, rel)
	}
	there, err := m.root.Identify(img, rel)
	if err != nil {
		return err
	}
	why, err := m.gaveUp(img, rel, there)
	if err != nil || why == nil {
		return err
	}
	mnt.Close() // while it is open, the mount is busy
	if err := m.root.UnmountTop(rel); err != nil {
		return err
	}
	return m.keptElsewhere(img, why, there.Device)
}

// checkReady looks at the filesystem of a volume that was kept ready, now that it is at its target:
// whether it gave up meanwhile shows only in the mount table. Then it is taken away again, with all
// others that are ready, and checkReady returns [errdefs.ErrUnderWay].
func (m *Manager) checkReady(img *image.Image, mnt *mount.Detached, rel string) error {
	is, err := place.VitalityOf(mnt.File())
	if err == nil && is == place.Alive {
		return nil
	}
	mnt.Close() // while it is open, the mount is busy
	m.contents.warm.stock.Drain()
	if err == nil {
		err = fmt.Errorf("%w: the filesystem that was kept ready for volume %s gave up after an error (see dmesg); try again to get a new one", errdefs.ErrUnderWay, img.ID())
	}
	return errors.Join(err, m.root.UnmountTop(rel))
}
