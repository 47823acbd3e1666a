// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
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
	// Allocated and Saved are those of [space.Space.Sharing].
	Allocated, Saved int64
}

// census keeps the latest Census. The zero value has none.
type census struct {
	mu     sync.Mutex
	is     Census
	err    error     // why it could not be taken
	until  time.Time // when it is to be taken again
	taking bool
}

// mostRest is how long a Census is kept at most.
const mostRest = time.Minute

// rest is how long a Census is kept that took so long: so that taking it takes a sixtieth of a percent of the time, or
// comes once a minute.
func rest(took time.Duration) time.Duration { return min(mostRest, 6000*took) }

// Census is what there is. Beside 10,000 volumes it takes some tens of milliseconds to look at all of them. So that
// happens in the background, and the answer is what was found the last time. Only the first call waits.
func (m *Manager) Census() (Census, error) {
	c := &m.census
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.until.IsZero():
		start := time.Now()
		is, err := m.count()
		c.set(is, err, start)
	case time.Now().After(c.until) && !c.taking && m.work.ctx.Err() == nil:
		c.taking = true
		m.work.wait.Go(func() {
			start := time.Now()
			is, err := m.count()
			c.mu.Lock()
			defer c.mu.Unlock()
			c.taking = false
			c.set(is, err, start)
		})
	}
	return c.is, c.err
}

// set keeps what was found. c is locked.
func (c *census) set(is Census, err error, start time.Time) {
	now := time.Now()
	c.is, c.err, c.until = is, err, now.Add(rest(now.Sub(start)))
}

// count takes a Census.
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
	c.Allocated, c.Saved, err = m.space.Sharing()
	return c, err
}

// Traffic is what the loop device of a volume has done since the kernel made the device.
type Traffic struct {
	Record image.Record
	Loop   loopdev.Attachment
	loopdev.Stats
}

// Traffic tells what each attached volume has done, if its image can be read. It takes some 20 µs for each.
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
		if err == nil { // else the volume has just ended, or cannot be read, as a list of volumes says of it
			all = append(all, t)
		}
	}
	return all, nil
}

// Promises are those of the pool: see [space.Space.Promises].
func (m *Manager) Promises() (space.Promises, error) { return m.space.Promises() }

// Inline counts the inline volumes of the node, and sums up their sizes in bytes.
func (m *Manager) Inline() (volumes int, bytes int64) { return m.quota.Total() }
