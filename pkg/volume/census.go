// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/space"
)

// This file is what metrics ask of the volumes.

// Class is what volumes are counted by.
type Class struct {
	Lifecycle image.Lifecycle
	Mode      image.Mode
}

// Classes are all classes.
var Classes = []Class{
	{image.Inline, image.ModeFilesystem}, {image.Inline, image.ModeDiskImage},
	{image.Claim, image.ModeFilesystem}, {image.Claim, image.ModeDiskImage}, {image.Claim, image.ModeBlock},
}

// Census is what there was at one moment.
type Census struct {
	Volumes   map[Class]int // each class, from 0
	Snapshots int
	// Loops are the loop devices of volumes, also of those that are kept ready or about to end.
	Loops int
}

// census keeps the latest Census. The zero value has none.
type census struct {
	mu    sync.Mutex
	is    Census
	until time.Time // when it is to be taken again
}

// Census counts what there is. The counts are up to a minute old where there is much to count.
func (m *Manager) Census() (Census, error) {
	m.census.mu.Lock()
	defer m.census.mu.Unlock()
	start := time.Now()
	if start.Before(m.census.until) {
		return m.census.is, nil
	}
	is, err := m.count()
	if err == nil {
		m.census.is, m.census.until = is, time.Now().Add(space.Rest(time.Since(start)))
	}
	return is, err
}

func (m *Manager) count() (c Census, err error) {
	loops, err := m.sweeper.Loops()
	if err != nil {
		return c, err
	}
	snapshots, err := m.pool.Snapshots()
	if err != nil {
		return c, err
	}
	c = Census{Volumes: map[Class]int{}, Snapshots: len(snapshots), Loops: len(loops)}
	for _, class := range Classes {
		c.Volumes[class] = 0
	}
	ids, err := m.pool.Volumes()
	if err != nil {
		return c, err
	}
	var mu sync.Mutex
	image.Each(len(ids), func(i int) {
		r, err := m.images.Get(ids[i])
		if err != nil {
			return // deleted meanwhile, or a file that the sweep reports
		}
		mu.Lock()
		defer mu.Unlock()
		c.Volumes[Class{r.Lifecycle, r.Mode}]++
	})
	return c, nil
}

// Traffic is what the loop device of a volume has done since the kernel made the device.
type Traffic struct {
	Record image.Record
	Loop   loopdev.Attachment
	loopdev.Stats
}

// Traffic tells what each attached volume has done. It takes some 20 µs for each.
func (m *Manager) Traffic() ([]Traffic, error) {
	loops, err := m.sweeper.Loops()
	if err != nil {
		return nil, err
	}
	var all []Traffic
	for _, l := range loops {
		if l.ID == "" {
			continue
		}
		t := Traffic{Loop: l.Attachment}
		if t.Record, err = m.images.Get(l.ID); err == nil {
			t.Stats, err = l.Stats()
		}
		switch {
		case errors.Is(err, errdefs.ErrNotFound), errors.Is(err, loopdev.ErrNotAttached), errors.Is(err, os.ErrNotExist):
			// The volume has just ended.
		case err != nil:
			return nil, err
		default:
			all = append(all, t)
		}
	}
	return all, nil
}

// Figures are those of the pool's space: see [space.Space.Figures].
func (m *Manager) Figures() (space.Figures, error) { return m.space.Figures() }

// Inline counts the inline volumes of the node, and sums up their sizes in bytes.
func (m *Manager) Inline() (volumes int, bytes int64) { return m.quota.Total() }
