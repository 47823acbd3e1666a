// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// ErrNotMounted means that a directory has a loopback pool, and that the pool is not mounted in
// this mount namespace. See [MountForThread].
var ErrNotMounted = errors.New("the loopback pool is not mounted here")

// OpenExisting opens the pool that Open made in dir before, loopback or not, and
// never makes one. It returns [ErrUnusable] if there is no pool, and [ErrNotMounted] if it is a
// loopback pool that is not mounted.
func OpenExisting(dir string) (*Pool, error) { return OpenExistingAs(Config{Dir: dir}) }

// OpenExistingAs is [OpenExisting] with the directory of the node that [Config] says, and with what is left free there.
func OpenExistingAs(c Config) (*Pool, error) {
	dir := c.Dir
	for _, root := range []string{dir, filepath.Join(dir, loopbackMount)} {
		if isPool(root) {
			return openRoot(root, c)
		}
	}
	image, err := os.Open(filepath.Join(dir, loopbackImage))
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w: %w; run this as root", ErrUnusable, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: there is no pool in %q; give --pool the directory that the plugin was given", ErrUnusable, dir)
	}
	defer image.Close()
	devices, err := loopdev.Find(image)
	if err != nil { // whoever may not look at the devices has not mounted one either
		return nil, fmt.Errorf("%w: %s: %w", ErrNotMounted, image.Name(), err)
	}
	mounted, err := isMountOf(filepath.Join(dir, loopbackMount), devices)
	if err != nil {
		return nil, err
	}
	if mounted {
		return nil, fmt.Errorf("%w: the filesystem in %s is not a pool: no plugin has laid it out", ErrUnusable, image.Name())
	}
	return nil, fmt.Errorf("%w: %s", ErrNotMounted, image.Name())
}

// Made reports whether a pool was ever made in a directory.
func Made(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, loopbackImage))
	return err == nil || hasImages(dir)
}

// isPool reports whether a directory has the subdirectories that layOut makes, with
// the mode and owner that layOut gives them. A pool of an older version lacks those that came later.
func isPool(root string) bool {
	for _, name := range subdirs {
		if slices.Contains(laterDirs, name) {
			continue
		}
		fi, err := os.Lstat(filepath.Join(root, name))
		if err != nil || fi.Mode() != os.ModeDir|0o700 || int(fi.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
			return false
		}
	}
	return true
}

// MountForThread mounts the loopback pool of dir in a mount namespace that the calling thread
// gets for itself: see [mount.Unshare]. It is for a command that is started where the pool is
// not mounted, such as on the node of a plugin in a container.
//
// The kernel has one filesystem for a loop device, however often it is mounted. So this is the
// filesystem that the plugin works on, with its locks. Which device that is, the inode behind
// it tells. If no device has the image, no plugin runs, and the image gets a device that goes
// with the namespace.
func MountForThread(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := mount.Unshare(); err != nil {
		return err
	}
	_, err = openLoopback(ctx, dir, 0)
	return err
}
