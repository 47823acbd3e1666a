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
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/flock"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	loopbackImage = "pool.img"
	loopbackMount = "mnt"
	loopbackLock  = "pool.lock"

	// minLoopback is the smallest filesystem that mkfs.xfs makes.
	minLoopback = 300 * size.MiB
)

// openLoopback finds or makes the xfs in dir/pool.img and returns where it is
// mounted.
//
// The image outlives the plugin, and its loop device may outlive it too: volumes keep
// the superblock alive even where a new process can see no mount of it. So if a device
// has the image already, that device is mounted again. A second device would make
// two live filesystems on one disk.
//
// Of a filesystem that other machines may share, neither a lock nor the loop devices of
// this machine tell whether the image is in use elsewhere: it is refused.
func openLoopback(ctx context.Context, dir string, bytes int64) (string, error) {
	if err := checkLocal(dir); err != nil {
		return "", err
	}
	lockfile, err := flock.Lock(ctx, filepath.Join(dir, loopbackLock), lockPoll)
	if err != nil {
		return "", err
	}
	defer (&Lock{lockfile}).Unlock()

	image, err := openLoopbackImage(dir, bytes)
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
		return "", fmt.Errorf("%w: %s is attached to several loop devices at once (%s); stop what uses all but one and detach them with `losetup -d`",
			ErrUnusable, image.Name(), nodes(devices))
	}
	if len(devices) == 1 {
		if err := prepare(image); err != nil {
			return "", err
		}
	}
	mounted, err := isMountOf(at, devices)
	if err != nil {
		return "", err
	}
	if !mounted {
		if err := mountLoopback(image, at); err != nil {
			return "", err
		}
	}
	if bytes == 0 { // whoever opens it does not know its size
		return at, nil
	}
	if err := growLoopback(image, at, bytes); err != nil {
		klog.ErrorS(err, "The loopback pool cannot grow, and stays as large as it is; make room below it and restart the plugin", "file", image.Name(), "wanted", size.Format(bytes))
	}
	return at, nil
}

// checkLocal refuses a directory that other machines may share.
func checkLocal(dir string) error {
	st, err := fsctl.StatusAt(dir)
	if err == nil && st.Type.MayBeShared() {
		err = health.Advise(fmt.Errorf("%w: %s is on a network or user-space filesystem (f_type %#x): two nodes would mount one image", ErrUnusable, dir, int64(st.Type)),
			"give --pool a directory on a local disk")
	}
	return err
}

// growLoopback makes a mounted pool so many bytes large, and never smaller. One that was
// interrupted is finished by the next.
func growLoopback(image *os.File, at string, bytes int64) error {
	has, _, err := measure(image)
	if err != nil {
		return err
	}
	if has > bytes {
		logs.Warn("The loopback pool is larger than --loopback-pool-size says; it is not shrunk", "file", image.Name(), "size", size.Format(has), "wanted", size.Format(bytes))
		bytes = has
	}
	if err := sparse.Extend(image, bytes); err != nil {
		return err
	}
	dev, err := loopdev.OpenBacked(image)
	if err != nil {
		return err
	}
	defer dev.Close()
	if err := dev.UpdateSize(); err != nil {
		return err
	}
	dir, err := os.Open(at)
	if err != nil {
		return err
	}
	defer dir.Close()
	return fsctl.Grow(dir, bytes)
}

// prepare gives the device that the image has already the state that a pool needs. One that
// drops flushes would lose what every volume has synced.
func prepare(image *os.File) error {
	dev, err := loopdev.OpenBacked(image)
	if errors.Is(err, loopdev.ErrNotAttached) { // detached meanwhile: it gets a new one
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(dev.Prepare(loopdev.Options{}), dev.Close())
}

func nodes(devices []int) string {
	var paths []string
	for _, i := range devices {
		paths = append(paths, fmt.Sprintf("/dev/loop%d", i))
	}
	return strings.Join(paths, ", ")
}

// isMountOf reports whether one of the loop devices is mounted at the path
// already. If something else is mounted there, it returns an error.
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
	defer dev.Close() // from then on only the mount keeps it attached
	// What is deleted in the pool is soon free below it. Deleting takes no longer for that: the
	// kernel discards after it has committed. See docs/figures.md.
	options := []string{"discard"}
	if full, err := filled(image); err != nil {
		return err
	} else if full { // somebody has preallocated it
		options = nil
	}
	config := mount.Config{FSType: "xfs", Source: dev.Path(), Data: append(options, "prjquota"), Attr: mount.Attr{NoSUID: true, NoDev: true, NoExec: true}}
	m, err := mount.New(config)
	if errors.Is(err, syscall.EINVAL) { // a kernel without CONFIG_XFS_QUOTA
		config.Data = options
		m, err = mount.New(config)
	}
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

// openLoopbackImage opens the pool's image, and makes it if there is none. The image
// gets its name when it is complete.
func openLoopbackImage(dir string, bytes int64) (*os.File, error) {
	path := filepath.Join(dir, loopbackImage)
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if err := checkLoopbackSize(bytes); err != nil {
		return nil, err
	}
	f, err = tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil, err
	}
	err = makeNoCOWFile(f)
	if err == nil {
		err = makeXFS(f, bytes)
	}
	if err != nil {
		f.Close()
		return nil, Full(err)
	}
	err = tmpfile.Publish(f, path)
	if err == nil { // this filesystem may be any
		err = tmpfile.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		f.Close()
		return nil, Full(err)
	}
	return f, nil
}

func checkLoopbackSize(bytes int64) error {
	if bytes < minLoopback {
		least := size.Format(minLoopback)
		return health.Advise(fmt.Errorf("%w: --loopback-pool-size %s: an xfs needs at least %s", ErrUnusable, size.Format(bytes), least), "give "+least+" or more")
	}
	return nil
}

// makeNoCOWFile sets chattr +C on an empty file on btrfs. Otherwise each write to the pool
// would take new space below it, and break the file into pieces.
func makeNoCOWFile(f *os.File) error {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.Btrfs {
		return err
	}
	return fsctl.AddFlags(f, fsctl.NoCOW)
}

// findMkfs looks for mkfs.xfs on PATH, and then in the directories where distributions
// install it.
func findMkfs() (string, error) {
	const name = "mkfs.xfs"
	for _, candidate := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", health.Advise(fmt.Errorf("%w: %s is neither on PATH nor in /usr/sbin", ErrUnusable, name), "install the package xfsprogs")
}

// makeXFS formats the file that is to be the pool. This is the only mkfs that runs on
// the node itself: once per node, on an empty file, and with no option from any user.
func makeXFS(f *os.File, bytes int64) error {
	if err := f.Truncate(bytes); err != nil {
		return fmt.Errorf("--loopback-pool-size %s: %w", size.Format(bytes), err)
	}
	mkfs, err := findMkfs()
	if err != nil {
		return err
	}
	// 4 KiB sectors: the volumes' own loop devices need them for direct I/O.
	cmd := exec.Command(mkfs, "-q", "-f", "-m", "reflink=1", "-s", "size=4096", "-d", "file,name=/proc/self/fd/3,size="+fmt.Sprint(bytes))
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}
