// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Severity is how bad a condition is.
type Severity int

// The severities, from the least.
const (
	Degraded     Severity = iota // usable
	Inaccessible                 // not usable on this node
	DataLoss                     // what it held is gone, or part of it
)

// Condition is something that is wrong with a volume, or with the pool.
type Condition struct {
	Severity Severity
	Reason   string // CamelCase
	Message  string // with what to do about it
}

// Health tells what is wrong with a persistent volume: nothing, if the list is
// empty. It looks at the image, at its devices, and at where it is mounted.
//
// A volume whose image is gone is ErrNotFound, unless something is still mounted
// of it at one of the paths.
func (m *Manager) Health(id string, paths ...string) ([]Condition, error) {
	img, err := m.openClaim(id)
	if errors.Is(err, ErrNotFound) {
		if gone, e := m.goneUnder(id, paths); e != nil || gone != "" {
			return []Condition{{DataLoss, "BackingImageMissing", fmt.Sprintf(
				"the image of volume %s was deleted while it is mounted at %s: copy what is needed from there now, as it is gone with the mount", id, gone)}}, e
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
	if img.Mode != ModeDiskImage {
		more, err := m.deviceConditions(img)
		if err != nil {
			return nil, err
		}
		conditions = append(conditions, more...)
	}
	if !img.Thick {
		conditions = append(conditions, m.PoolHealth()...)
	}
	return conditions, nil
}

func (m *Manager) imageConditions(img *image) ([]Condition, error) {
	var found []Condition
	if err := img.whole(); errors.Is(err, ErrState) {
		found = append(found, Condition{DataLoss, "BackingImageTruncated", err.Error()})
	} else if err != nil {
		return nil, err
	}
	if taken, err := allocated(img.File); err != nil {
		return nil, err
	} else if img.Thick && taken < img.Spec.Size {
		found = append(found, Condition{Degraded, "ReservationIncomplete", fmt.Sprintf(
			"of the %s of thick volume %s, %s are not reserved at the moment: they are taken again within minutes; if this stays, make room in the pool",
			size.Format(img.Spec.Size), img.ID, size.Format(img.Spec.Size-taken))})
	}
	return found, nil
}

func (m *Manager) deviceConditions(img *image) ([]Condition, error) {
	loops, err := loopdev.Find(img.File)
	if err != nil {
		return nil, err
	}
	var found []Condition
	for _, index := range loops {
		if direct, err := loopdev.Direct(index); err == nil && !direct {
			found = append(found, Condition{Degraded, "DirectIOLost", fmt.Sprintf(
				"/dev/loop%d of volume %s does buffered I/O, which is many times slower and takes memory: restart the pod; if it stays, see that the pool's filesystem has blocks of %d bytes", index, img.ID, loopdev.BlockSize)})
			break // once for each reason
		}
	}
	places, err := m.placesOf(img, loops)
	if err != nil || img.Mode != ModeFilesystem || len(places) == 0 {
		return found, err
	}
	root, err := m.openPlace(places[0])
	switch {
	case errors.Is(err, syscall.EIO):
		return append(found, shutDown(img, places[0])), nil
	case errors.Is(err, os.ErrNotExist), errors.Is(err, ErrState): // unmounted meanwhile
		return found, nil
	case err != nil:
		return nil, err
	}
	defer root.Close()
	return append(found, filesystemConditions(img, root, places[0])...), nil
}

// filesystemConditions asks the filesystem that is mounted at a place how it is, by
// its root, open with O_PATH.
func filesystemConditions(img *image, root *os.File, at string) []Condition {
	// What has shut down answers a look at its root with EIO, or says so in its
	// options; statfs(2) goes on to work.
	dir, err := mount.Open(root)
	if err == nil {
		_, err = dir.Readdirnames(1)
		dir.Close()
	}
	if errors.Is(err, syscall.EIO) {
		return []Condition{shutDown(img, at)}
	}
	info, err := mount.Of(root)
	if err != nil || info == nil {
		return nil
	}
	options := strings.Split(info.VFSOptions, ",")
	if slices.Contains(options, "shutdown") {
		return []Condition{shutDown(img, at)}
	}
	if slices.Contains(options, "ro") || slices.Contains(options, "emergency_ro") {
		return []Condition{{Inaccessible, "FilesystemReadOnly", fmt.Sprintf(
			"the kernel made the filesystem of volume %s read-only after an error, see its log (dmesg): make room in the pool if it is full, then restart the pod, which mounts it anew", img.ID)}}
	}
	return nil
}

func shutDown(img *image, at string) Condition {
	return Condition{Inaccessible, "FilesystemShutDown", fmt.Sprintf(
		"the kernel shut the filesystem of volume %s at %s down after an error, see its log (dmesg): make room in the pool if it is full, then restart the pod, which mounts it anew", img.ID, at)}
}

// goneUnder returns the first of the paths where a volume without an image is
// still mounted, or "".
func (m *Manager) goneUnder(id string, paths []string) (string, error) {
	for _, path := range paths {
		rel, err := m.relative(path)
		if err != nil {
			continue // not one of ours
		}
		img, err := m.lost(id, rel)
		if err != nil {
			return "", err
		}
		at, err := m.look(rel, img.Mode)
		if err != nil || !at.mounted {
			continue
		}
		if s, err := m.shown(img, rel); err == nil && s.device >= 0 {
			return filepath.Join(m.rootPath, rel), nil
		}
	}
	return "", nil
}

// PoolHealth tells what is wrong with the pool.
func (m *Manager) PoolHealth() []Condition {
	if err := m.pool.Check(); err != nil {
		return []Condition{{Inaccessible, "PoolUnusable", err.Error()}}
	}
	if err := m.roomLeft(); err != nil {
		return []Condition{{Degraded, "PoolFull", err.Error()}}
	}
	return nil
}
