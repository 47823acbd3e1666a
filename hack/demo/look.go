// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// settleTimeout is what the kernel gets to detach loop devices and to free space. It does both in the background, within
// milliseconds.
const settleTimeout = 10 * time.Second

// write fills the volume and waits until all of it is in the pool.
func (v *vol) write() error {
	random := make([]byte, payload)
	rand.Read(random)
	for name, content := range map[string][]byte{"greeting": []byte(v.greeting), "random": random} {
		if err := os.WriteFile(filepath.Join(v.Target, name), content, 0o644); err != nil {
			return err
		}
	}
	return syncFS(v.Target)
}

// mounted asks the kernel what is mounted at the target, and blkid, which knows nothing of the plugin, for the UUID of
// that filesystem.
func (v *vol) mounted() (device, id string, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(v.Target))
	if err != nil {
		return "", "", err
	}
	if len(mounts) != 1 || mounts[0].FSType != v.fs {
		return "", "", fmt.Errorf("mountinfo has no mount of %s at %s", v.fs, v.Target)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.Target, &st); err != nil {
		return "", "", err
	}
	if int64(st.Type) != v.magic {
		return "", "", fmt.Errorf("statfs returns the f_type %#x, expected %#x of %s", st.Type, v.magic, v.fs)
	}
	device = mounts[0].Source
	out, err := exec.Command("blkid", "-p", "-o", "value", "-s", "UUID", device).Output()
	if err != nil {
		return "", "", fmt.Errorf("blkid -p %s: %w", device, err)
	}
	return device, strings.TrimSpace(string(out)), nil
}

// left waits until there are as many images, loop devices and mounts as there are volumes, and otherwise says what there is.
func (d *demo) left(volumes int) error {
	return eventually(func() error {
		found, err := d.Find()
		if err != nil {
			return err
		}
		found.Images = slices.DeleteFunc(found.Images, func(name string) bool { return !strings.HasPrefix(name, idPrefix) })
		if len(found.Images) != volumes || len(found.Loops) != volumes || len(found.Mounts) != volumes {
			return fmt.Errorf("expected %d images, loop devices and mounts, found %s", volumes, strings.Join(found.List(), ", "))
		}
		return nil
	})
}

// available measures the pool's free space, once it no longer changes.
func (d *demo) available() (int64, error) {
	last := int64(-1)
	for end := time.Now().Add(settleTimeout); ; time.Sleep(100 * time.Millisecond) {
		if err := syncFS(d.root); err != nil {
			return 0, err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(d.root, &st); err != nil {
			return 0, err
		}
		now := int64(st.Bavail) * st.Bsize
		if now == last || time.Now().After(end) {
			return now, nil
		}
		last = now
	}
}

// syncFS waits until everything that was written is on disk: syncfs(2).
func syncFS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}

// readRecord reads the record of an image, from the image itself.
func readRecord(path string, attr pool.Attr, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return pool.GetRecord(f, attr, v)
}

// eventually repeats a check whose subject may take the kernel a moment.
func eventually(f func() error) error {
	for end := time.Now().Add(settleTimeout); ; time.Sleep(20 * time.Millisecond) {
		if err := f(); err == nil || time.Now().After(end) {
			return err
		}
	}
}
