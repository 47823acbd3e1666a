// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// straight is the floor: what a volume cannot do without, as system calls of one thread. Image, loop device and mount
// have what the plugin's have: shared extents, 4 KiB blocks, direct I/O, autoclear, the same options.
//
// Two clones of one image can be mounted without another UUID: ext4 does not care, xfs is mounted with nouuid, and btrfs
// gives the second one a temporary fsid since Linux 6.7. So the floor leaves the UUID out, unless identify is set.
type straight struct {
	templates map[kind]string
	loops     *indices
	identify  bool
}

func (w straight) prepare(v *volume) (err error) {
	if v.loop, err = w.loops.take(); err != nil {
		return err
	}
	return os.MkdirAll(v.target, 0o750)
}

func (w straight) publish(_ context.Context, v *volume) error {
	dst, err := clone(w.templates, v, w.identify)
	if err != nil {
		return err
	}
	defer dst.Close()
	loop, err := w.attach(v, dst)
	if err != nil {
		return err
	}
	defer loop.Close()
	if err := unix.Mount(loop.Name(), v.target, v.fs, 0, strings.Join(mountData(v.fs), ",")); err != nil {
		return fmt.Errorf("mount %s on %s: %w", v.fs, loop.Name(), err)
	}
	return nil
}

// clone makes a volume's file, open for writing: a clone of its template, with a UUID of its own if it is to be identified.
func clone(templates map[kind]string, v *volume, identify bool) (*os.File, error) {
	src, err := os.Open(templates[kind{v.fs, v.size}])
	if err != nil {
		return nil, err
	}
	defer src.Close()
	dst, err := os.OpenFile(v.image, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err = os.NewSyscallError("FICLONE", unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))); err == nil && identify {
		err = newIdentity(v.fs, src, dst)
	}
	if err != nil {
		dst.Close()
		return nil, err
	}
	return dst, nil
}

// attach takes another device for good if some other program has taken or removed the volume's meanwhile.
func (w straight) attach(v *volume, file *os.File) (*os.File, error) {
	for {
		loop, err := os.OpenFile(loopPath(v.loop), os.O_RDWR, 0)
		if err == nil {
			if err = attach(loop, file, v.image); err == nil {
				return loop, nil
			}
			loop.Close()
		}
		// ENXIO: it is being detached. ENOENT: it was removed.
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
		if v.loop, err = w.loops.take(); err != nil {
			return nil, err
		}
	}
}

func (w straight) unpublish(_ context.Context, v *volume) error {
	if err := unix.Unmount(v.target, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("umount %s: %w", v.target, err)
	}
	return os.NewSyscallError("unlink", unix.Unlink(v.image))
}

func (w straight) tidy(v *volume) error {
	w.loops.put(v.loop)
	return os.RemoveAll(v.pod)
}

// newIdentity writes another UUID into a clone: the blocks of the superblocks, and nothing else.
func newIdentity(fs string, src, dst *os.File) error {
	format, err := diskfs.Lookup(fs)
	if err != nil {
		return err
	}
	return format.NewIdentity(src, dst, uuid.New())
}
