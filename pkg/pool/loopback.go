// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

const (
	loopbackImage = "pool.img"
	loopbackMount = "mnt"
	loopbackLock  = "pool.lock"

	// minLoopback is what mkfs.xfs insists on.
	minLoopback = 300 << 20
)

// shared are the f_type values, statfs(2), of filesystems that other machines may
// see too, where neither a lock nor the list of loop devices tells of them.
var shared = []int64{
	unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC,
	unix.CEPH_SUPER_MAGIC, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC,
}

// openLoopback finds or makes the xfs in dir/pool.img and returns where it is
// mounted.
//
// The image outlives the plugin, and so may its loop device: volumes keep the
// superblock alive even where no mount of it is visible to a new process. So
// the device that backs the image already is mounted again; a second one would
// be two live filesystems on one disk.
func openLoopback(ctx context.Context, dir string, size int64) (string, error) {
	if id, err := statfs(dir); err != nil {
		return "", err
	} else if slices.Contains(shared, id.magic) {
		return "", fmt.Errorf("%w: %s is on a network or user-space filesystem (f_type %#x): two nodes would mount one image; give --pool a directory on a local disk",
			ErrUnusable, dir, id.magic)
	}
	lock := flock.New(filepath.Join(dir, loopbackLock), flock.SetPermissions(0o600))
	if ok, err := lock.TryLockContext(ctx, lockPoll); !ok {
		return "", fmt.Errorf("lock %s: %w", lock.Path(), err)
	}
	defer lock.Close()

	image, err := openLoopbackImage(dir, size)
	if err != nil {
		return "", err
	}
	defer image.Close()
	at := filepath.Join(dir, loopbackMount)
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	devices, err := loopdev.Find(image)
	if err != nil {
		return "", err
	}
	if len(devices) > 1 {
		return "", fmt.Errorf("%w: %s is attached to the loop devices %v at once; stop what uses all but one and detach them with `losetup -d`", ErrUnusable, image.Name(), devices)
	}
	if mounted, err := isMountOf(at, devices); err != nil || mounted {
		return at, err
	}
	return at, mountLoopback(image, at)
}

// isMountOf reports whether one of the loop devices is mounted at the path
// already. A mount of anything else there is an error.
func isMountOf(at string, devices []int) (bool, error) {
	info, err := mount.At(at)
	if err != nil || info == nil {
		return false, err
	}
	if i, ok := loopdev.IndexOf(info.Source); ok && slices.Contains(devices, i) {
		return true, nil
	}
	return false, fmt.Errorf("%w: %s is a mount of %s; unmount it", ErrUnusable, at, info.Source)
}

func mountLoopback(image *os.File, at string) error {
	dev, err := loopdev.OpenBacked(image)
	if errors.Is(err, loopdev.ErrNotAttached) {
		dev, err = new(loopdev.Allocator).Attach(image, loopdev.Options{AutoClear: true, Name: loopbackImage})
	}
	if err != nil {
		return err
	}
	defer dev.Close() // the mount keeps it attached, and only the mount
	m, err := mount.New(mount.Config{FSType: "xfs", Source: dev.Path(), Attr: mount.Attr{NoSUID: true, NoDev: true, NoExec: true}})
	if err != nil {
		return err
	}
	defer m.Close()
	target, err := os.Open(at)
	if err != nil {
		return err
	}
	defer target.Close()
	return m.Attach(target)
}

// openLoopbackImage opens the pool's image, making it first if there is none.
// It gets its name when it is whole.
func openLoopbackImage(dir string, size int64) (*os.File, error) {
	path := filepath.Join(dir, loopbackImage)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if size < minLoopback {
		return nil, fmt.Errorf("%w: --loopback-pool-size %d: an xfs needs at least %d bytes (300Mi)", ErrUnusable, size, int64(minLoopback))
	}
	f, err = tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil, err
	}
	if err := makeXFS(f, size); err != nil {
		f.Close()
		return nil, full(err)
	}
	if err := tmpfile.Publish(f, path); err != nil {
		f.Close()
		return nil, full(err)
	}
	return f, nil
}

// findMkfs looks on PATH and where mkfs is even if PATH does not say so.
func findMkfs() (string, error) {
	const name = "mkfs.xfs"
	for _, candidate := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: %s is neither on PATH nor in /usr/sbin; install the package xfsprogs", ErrUnusable, name)
}

// makeXFS formats the pool itself. This is the one mkfs that runs on the node:
// it works on an empty file, once per node, with no option of any user.
func makeXFS(f *os.File, size int64) error {
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("--loopback-pool-size %d: %w", size, err)
	}
	mkfs, err := findMkfs()
	if err != nil {
		return err
	}
	// 4 KiB sectors: the volumes' own loop devices need them for direct I/O.
	cmd := exec.Command(mkfs, "-q", "-f", "-m", "reflink=1", "-s", "size=4096", "-d", "file,name=/proc/self/fd/3,size="+fmt.Sprint(size))
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}
