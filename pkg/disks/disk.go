// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

// Disk is a disk that has no name.
type Disk struct {
	File *os.File
	// UUID is that of its filesystem; zero if it has none, or as many as its source has.
	UUID uuid.UUID
	// Copied says why the disk shares no extents with its source; "" if it does, or has none.
	Copied string
}

// Made is a disk that has a name.
type Made struct {
	Path   string
	UUID   uuid.UUID
	Copied string // see [Disk]
	Takes  int64  // space that it shares with no other file, in bytes
	Shares int64  // space that it shares, in bytes
}

// Publish makes the disk durable, gives it its name, and closes it. With replace a regular file
// that has the name loses it; without, or if the name is that of something else, the error is
// [os.ErrExist]. Whoever has the old file open keeps it.
func (d *Disk) Publish(path string, replace bool) (Made, error) {
	defer d.File.Close()
	if err := d.link(path, replace); err != nil {
		return Made{}, err
	}
	m := Made{Path: path, UUID: d.UUID, Copied: d.Copied}
	return m, m.measure(d.File)
}

func (d *Disk) link(path string, replace bool) error {
	fi, err := os.Lstat(path)
	switch {
	case err == nil && replace && fi.Mode().IsRegular():
		return tmpfile.Replace(d.File, path)
	case err == nil:
		return &os.PathError{Op: "name a disk", Path: path, Err: os.ErrExist}
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	if err := tmpfile.Publish(d.File, path); err != nil {
		return err
	}
	return tmpfile.SyncDir(filepath.Dir(path))
}

// measure finds out what space a disk takes. Filesystems without FIEMAP share nothing.
func (m *Made) measure(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	m.Takes = fi.Sys().(*syscall.Stat_t).Blocks * 512
	if m.Copied != "" {
		return nil
	}
	own, err := fiemap.Unshared(f)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	m.Takes, m.Shares = own, max(0, m.Takes-own)
	return err
}

// atOnce is how many disks are made at the same time. Most of a disk's time is spent on two
// fsyncs, which share the filesystem's journal when they come together.
const atOnce = 8

// Make makes a disk at each of the paths, as [Disk.Publish] does, in their order. It returns those that
// were made, also beside an error: they are whole, and stay. When ctx ends, the disks are finished that
// are about to get their names, and no other one.
func (s Source) Make(ctx context.Context, paths []string, replace bool) ([]Made, error) {
	all := make([]Made, len(paths))
	g, working := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i, path := range paths {
		if working.Err() != nil {
			break
		}
		g.Go(func() (err error) {
			all[i], err = s.make(working, path, replace)
			return err
		})
	}
	err := g.Wait()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return slices.DeleteFunc(all, func(m Made) bool { return m.Path == "" }), err
}

func (s Source) make(ctx context.Context, path string, replace bool) (Made, error) {
	d, err := s.New(ctx, filepath.Dir(path))
	if err != nil {
		return Made{}, fmt.Errorf("%s: %w", path, err)
	}
	return d.Publish(path, replace)
}
