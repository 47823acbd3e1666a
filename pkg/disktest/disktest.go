// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disktest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/disks"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

// Options say which disk a test gets. The zero value is an ext4 of the usual size.
type Options struct {
	// Filesystem is btrfs, ext4 or xfs, or raw for a disk with nothing in it; "" is ext4.
	Filesystem string
	// Size is in bytes, rounded up to MiB; 0 is the filesystem's default.
	Size int64
	// Cache is the directory for templates. It is made if it does not exist, belongs to the user who
	// runs the test, and may be deleted when no test runs. "" is csi-disktemplate/disktest below
	// [os.UserCacheDir].
	Cache string
}

// Mounted mounts a disk for the time of the test, and returns the path. If the test leaves files
// open there, it fails. It needs root.
func Mounted(t testing.TB, o Options) string {
	t.Helper()
	dev, fs := attach(t, o, true)
	defer dev.Close() // from now on the mount holds the device, and the device the disk
	mnt, err := mount.New(mount.Config{FSType: fs.Name, Source: dev.Path(), Data: fs.MountData})
	if err != nil {
		t.Fatalf("disktest: %v", err)
	}
	defer mnt.Close()
	at := t.TempDir()
	target, err := os.Open(at)
	if err != nil {
		t.Fatalf("disktest: %v", err)
	}
	defer target.Close()
	if err := mnt.Attach(target); err != nil {
		t.Fatalf("disktest: %v", err)
	}
	t.Cleanup(func() { unmount(t, at) })
	return at
}

// Device attaches a disk to a loop device for the time of the test, and returns the device's path.
// It needs root.
func Device(t testing.TB, o Options) string {
	t.Helper()
	dev, _ := attach(t, o, false)
	t.Cleanup(func() {
		if err := dev.Detach(); err != nil {
			t.Errorf("disktest: %v", err)
		}
	})
	return dev.Path()
}

// File makes a disk in a file for the time of the test, and returns the file's path. It needs no
// root.
func File(t testing.TB, o Options) string {
	t.Helper()
	dir := t.TempDir()
	d, _ := disk(t, o, dir)
	defer d.File.Close()
	path := filepath.Join(dir, "disk.img")
	if err := tmpfile.Link(d.File, path); err != nil {
		t.Fatalf("disktest: %v", err)
	}
	return path
}

// disk makes a disk without a name in a directory; "" is that of the cache.
func disk(t testing.TB, o Options, dir string) (*disks.Disk, *diskfs.Filesystem) {
	t.Helper()
	spec, fs, err := o.spec()
	if err != nil {
		t.Fatalf("disktest: %v", err)
	}
	d, err := newDisk(t.Context(), o, spec, dir)
	if err != nil {
		t.Fatalf("disktest: no disk (%s) can be made: %v", spec, err)
	}
	return d, fs
}

// spec says what to make.
func (o Options) spec() (diskfs.Spec, *diskfs.Filesystem, error) {
	name := o.Filesystem
	if name == "" {
		name = diskfs.Default
	}
	fs, err := diskfs.Lookup(name)
	if err != nil {
		return diskfs.Spec{}, nil, fmt.Errorf("Options.Filesystem: %w", err)
	}
	spec := diskfs.Spec{Filesystem: fs.Name, Size: diskfs.RoundUp(o.Size)}
	if o.Size == 0 {
		spec.Size = fs.DefaultSize()
	}
	if err := spec.Validate(); err != nil {
		return spec, fs, fmt.Errorf("Options: %w", err)
	}
	return spec, fs, nil
}

// loops picks the loop devices of this process.
var loops loopdev.Allocator

// attach makes a disk, and attaches it to a loop device. The disk has no name, so it is gone with
// the device.
func attach(t testing.TB, o Options, mounted bool) (*loopdev.Device, *diskfs.Filesystem) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("disktest: only root can mount a disk or attach it to a device; " +
			"run the test as root, or use disktest.File")
	}
	if _, fs, err := o.spec(); err == nil && mounted && !fs.Formatted() {
		t.Fatalf("disktest: a disk of %s has no filesystem, so it cannot be mounted; "+
			"use disktest.Device or disktest.File", fs.Name)
	}
	d, fs := disk(t, o, "")
	defer d.File.Close()
	dev, err := loops.Attach(d.File, loopdev.Options{
		AutoClear: mounted, DropFlushes: true, Name: "disktest " + t.Name(),
	})
	if errors.Is(err, loopdev.ErrNotDirect) {
		err = fmt.Errorf("%w; give Options.Cache a directory on btrfs, ext4 or xfs", err)
	}
	if err != nil {
		t.Fatalf("disktest: %v", err)
	}
	return dev, fs
}

const (
	// settleTime is how long a mount may stay busy: a process that is just being started has copies
	// of all descriptors until its execve.
	settleTime = time.Second
	settlePoll = 10 * time.Millisecond
)

// unmount unmounts a disk. If something still uses it, the test fails, and the disk goes with its
// last user.
func unmount(t testing.TB, at string) {
	err := tryUnmount(at)
	deadline := time.Now().Add(settleTime)
	for errors.Is(err, syscall.EBUSY) && time.Now().Before(deadline) {
		time.Sleep(settlePoll)
		err = tryUnmount(at)
	}
	if err == nil {
		return
	}
	t.Errorf("disktest: %v", err)
	if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
		t.Errorf("disktest: umount %s: %v", at, err)
	}
}

func tryUnmount(at string) error {
	parent, err := os.Open(filepath.Dir(at))
	if err != nil {
		return err
	}
	defer parent.Close()
	return mount.UnmountTarget(parent, filepath.Base(at))
}
