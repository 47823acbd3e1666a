// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// This file looks at all volumes for people. It takes no lock of a volume, so that what it says of one that
// changes meanwhile may be true of no single moment.

// Phase is how far a volume is from its end.
type Phase int

// The phases.
const (
	Lives Phase = iota
	// IsKept means that its pod is done with it, and that it waits to be committed to a golden.
	IsKept
	// IsEnding means that it is deleted, and that it still takes space.
	IsEnding
)

// Listed is a volume as it is at the moment.
type Listed struct {
	image.Record
	Phase      Phase
	Allocated  int64    // of the pool, in bytes, shared extents included
	Used       int64    // in bytes: of its filesystem where that is mounted, else Allocated
	Published  []string // where pods have it
	Staged     []string
	Loops      []int
	WasReady   bool // it was made before anybody asked for it, as far as its device tells
	Conditions []health.Condition
}

// List lists all volumes: those that live, by id, then those that are kept, then those that end. Of those that live
// and are attached it also looks at the health. Of one whose image cannot be read it has the id, and a condition.
//
// Beside 10,000 volumes it takes about as long as [Manager.ListClaims] (`-bench Many ./pkg/volume`), and some 30 µs for
// each loop device of the node.
func (m *Manager) List() ([]Listed, error) {
	look, err := m.lookAround()
	if err != nil {
		return nil, err
	}
	ids, err := m.pool.Volumes()
	if err != nil {
		return nil, err
	}
	all, _, err := page(ids, "", 0, &m.unread, look.volumeOrWhy)
	if err != nil {
		return nil, err
	}
	kept, err := m.pool.Commits()
	if err != nil {
		return nil, err
	}
	for _, id := range kept {
		v, err := m.keptVolume(id)
		switch {
		case err == nil:
			all = append(all, v)
		case !errors.Is(err, errdefs.ErrNotFound): // else it is committed by now
			all = append(all, unreadable(id, err))
		}
	}
	return append(all, m.endings.list()...), nil
}

// Describe looks at one volume, with its health. own is what no other file of the pool shares of it, in bytes; the
// filesystem is asked for each extent. Errors are those of [image.Store.Open].
func (m *Manager) Describe(id string) (v Listed, own int64, err error) {
	if err := image.CheckID(id); err != nil {
		return v, 0, err
	}
	img, err := m.images.Open(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return m.describeGone(id, err)
	}
	if err != nil {
		return v, 0, err
	}
	defer img.Close()
	look, err := m.lookAround()
	if err == nil {
		v, err = look.volume(id)
	}
	if err == nil {
		v.Conditions, err = m.healthOf(id, slices.Concat(v.Published, v.Staged))
	}
	if err == nil {
		own, err = fiemap.Unshared(img.File)
	}
	return v, min(own, v.Allocated), err
}

// describeGone describes a volume that has ended, and is kept or still takes space.
func (m *Manager) describeGone(id string, notFound error) (v Listed, own int64, err error) {
	if v, err := m.keptVolume(id); !errors.Is(err, errdefs.ErrNotFound) {
		return v, 0, err
	}
	for _, v := range m.endings.list() {
		if v.ID == id {
			return v, 0, nil
		}
	}
	return v, 0, notFound
}

func (m *Manager) keptVolume(id string) (v Listed, err error) {
	img, err := m.images.OpenKept(id)
	if err != nil {
		return v, err
	}
	defer img.Close()
	v = Listed{Record: img.Record, Phase: IsKept}
	v.Allocated, err = img.Allocated()
	v.Used = v.Allocated
	return v, err
}

// around is what is read once for all volumes.
type around struct {
	*Manager
	table place.Table
	loops map[image.FileID][]attachment
}

// attachment is a loop device that has a file of the pool.
type attachment struct {
	index int
	name  string
}

// lookAround reads the mount table, and asks all loop devices for their files.
func (m *Manager) lookAround() (around, error) {
	a := around{Manager: m, loops: map[image.FileID][]attachment{}}
	if err := m.pool.Check(); err != nil { // volumes are found by their paths
		return a, err
	}
	dir, err := os.Stat(m.images.Dir())
	if err != nil {
		return a, err
	}
	indices, err := loopdev.Attached()
	if err != nil {
		return a, err
	}
	infos := make([]loopdev.Info, len(indices))
	image.Each(len(indices), func(i int) { infos[i] = infoOf(indices[i]) })
	for i, info := range infos {
		if info.Device == dir.Sys().(*syscall.Stat_t).Dev {
			of := image.FileID{Device: info.Device, Inode: info.Inode}
			a.loops[of] = append(a.loops[of], attachment{indices[i], info.Name})
		}
	}
	a.table, err = place.ReadTable()
	return a, err
}

// infoOf asks a device. One that was detached meanwhile, or is somebody else's and does not answer, has no file here.
func infoOf(index int) (info loopdev.Info) {
	dev, err := loopdev.Open(index)
	if err != nil {
		return info
	}
	defer dev.Close()
	info, _ = dev.Info()
	return info
}

// volume looks at one volume.
func (a around) volume(id string) (v Listed, err error) {
	st, err := a.pool.StatVolume(id)
	if errors.Is(err, os.ErrNotExist) {
		return v, fmt.Errorf("%w: volume %s", errdefs.ErrNotFound, id)
	}
	if err != nil {
		return v, err
	}
	if v.Record, err = a.images.Get(id); err != nil {
		return v, err
	}
	v.Allocated, v.Used = st.Allocated, st.Allocated
	for _, l := range a.loops[image.FileID{Device: st.Device, Inode: st.Inode}] {
		v.Loops = append(v.Loops, l.index)
		v.WasReady = v.WasReady || l.name == place.ReadyDevice
	}
	places := a.table.Of(v.Record, v.Loops)
	for _, at := range places {
		if strings.Contains(at, podsDir) || at == a.root.AsMounted(v.Target) {
			v.Published = append(v.Published, at)
		} else {
			v.Staged = append(v.Staged, at)
		}
	}
	if v.Mode == image.ModeBlock && len(v.Loops) > 0 {
		if err := a.stagedBlock(&v); err != nil {
			return v, err
		}
	}
	if len(places) == 0 && len(v.Loops) == 0 {
		return v, nil
	}
	if used, err := a.used(v, places); err == nil { // one that gave up is not asked
		v.Used = used
	}
	v.Conditions, err = a.healthOf(id, places)
	return v, err
}

// healthOf is [Manager.Health] for a list, which must not leave out a volume that cannot be looked at.
func (m *Manager) healthOf(id string, places []string) ([]health.Condition, error) {
	found, err := m.Health(id, places...)
	if err == nil || errors.Is(err, errdefs.ErrNotFound) {
		return found, err
	}
	return unknown(err), nil
}

func unknown(err error) []health.Condition {
	return []health.Condition{{Code: "HealthUnknown", Severity: health.Degraded, Text: err.Error()}}
}

// unreadable is what a list has of a volume whose image cannot be read.
func unreadable(id string, err error) Listed {
	return Listed{Record: image.Record{ID: id}, Conditions: unknown(err)}
}

// volumeOrWhy is volume for a list, which must not leave out a volume whose image cannot be read.
func (a around) volumeOrWhy(id string) (Listed, error) {
	v, err := a.volume(id)
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return unreadable(id, err), nil
	}
	return v, err
}

// podsDir is where kubelet has the directories of pods. A command may not know kubelet's directory.
const podsDir = "/pods/"

// stagedBlock finds where a block volume is staged, at which nothing is mounted.
func (a around) stagedBlock(v *Listed) error {
	img, err := a.images.Open(v.ID)
	if err != nil {
		return err
	}
	defer img.Close()
	if at, staged, err := img.Staged(); err != nil {
		return err
	} else if staged {
		v.Staged = append(v.Staged, at)
	}
	return nil
}

// used measures a volume's filesystem at the first of its places.
func (a around) used(v Listed, places []string) (int64, error) {
	if v.Mode != image.ModeFilesystem || len(places) == 0 {
		return v.Allocated, nil
	}
	root, err := a.root.OpenMountpoint(places[0])
	if err != nil {
		return 0, err
	}
	defer root.Close()
	st, err := fsctl.StatusOf(root)
	return st.Used, err
}
