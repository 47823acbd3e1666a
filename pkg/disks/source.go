// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

var (
	// ErrUnusable means that a directory can hold no disks.
	ErrUnusable = errors.New("no disk can be made there")
	// ErrTooSmall means that a whole disk is larger than the disks that are to be made of it.
	ErrTooSmall = errors.New("the size is too small")
)

// Source is what disks are made of.
type Source struct {
	// File is open for reading, and nobody writes to it. With nil the disks are empty.
	File *os.File
	// Spec is that of the disks. A whole disk may be larger than File: the rest is empty. Its size
	// 0 is that of File.
	Spec diskfs.Spec
}

// New makes a disk in a directory, without a name. It is gone when its file is closed, unless
// [Disk.Publish] names it.
//
// Errors are [ErrUnusable], [ErrTooSmall], [syscall.ENOSPC], [syscall.EFBIG] for a filesystem that
// holds no file of this size, and the cause of ctx.
func (s Source) New(ctx context.Context, dir string) (*Disk, error) {
	f, err := NewFile(dir)
	if err != nil {
		return nil, err
	}
	d := &Disk{File: f}
	if err := s.fill(ctx, d); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// NewFile makes an empty file without a name for an image, or returns [ErrUnusable].
func NewFile(dir string) (*os.File, error) {
	f, err := tmpfile.Create(dir, 0o644)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w; choose a directory on btrfs, ext4, xfs or tmpfs: "+
			"the filesystem must support unnamed files (O_TMPFILE)", ErrUnusable, err)
	}
	return f, nil
}

// fill gives an empty disk its content, and an identity of its own.
func (s Source) fill(ctx context.Context, d *Disk) error {
	if s.File == nil {
		return sparse.SetLength(d.File, s.Spec.Size)
	}
	fi, err := s.File.Stat()
	if err != nil {
		return err
	}
	if s.Spec.Size > 0 && s.Spec.Size < fi.Size() {
		return fmt.Errorf("%w: content %s is a disk of %s; ask for a larger size, or for none",
			ErrTooSmall, s.Spec.Content, size.Format(fi.Size()))
	}
	if d.Copied, err = Share(ctx, d.File, s.File); err != nil {
		return err
	}
	if err := sparse.Extend(d.File, s.Spec.Size); err != nil {
		return err
	}
	return s.identify(d)
}

// identify gives a disk's filesystem a UUID of its own, before anybody can mount it: a kernel
// refuses, or confuses, two filesystems with one UUID. What is inside of a whole disk keeps its own.
func (s Source) identify(d *Disk) error {
	fs, err := diskfs.Lookup(s.Spec.Filesystem)
	if err != nil || !fs.Formatted() {
		return err
	}
	d.UUID = uuid.New()
	return fs.NewIdentity(s.File, d.File, d.UUID)
}

// Share makes an empty file a clone of another one or, where that is not possible, a sparse copy.
// Then it returns why.
func Share(ctx context.Context, dst, src *os.File) (copied string, err error) {
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	err = reflink.Clone(dst, src)
	if err == nil {
		return "", nil
	}
	if copied = whyCopied(dst, err); copied == "" {
		return "", err
	}
	if err := sparse.Copy(ctx, dst, src); err != nil {
		return copied, err
	}
	fi, err := src.Stat()
	if err != nil {
		return copied, err
	}
	return copied, sparse.SetLength(dst, fi.Size())
}

// whyCopied says why a file cannot be a clone. It returns "" for an error that a copy would meet too.
func whyCopied(dst *os.File, err error) string {
	switch {
	case errors.Is(err, syscall.EXDEV): // before ErrUnsupported: the disks may be on one that could share
		return "the template is on another filesystem"
	case errors.Is(err, reflink.ErrUnsupported):
		if st, err := fsctl.StatusOf(dst); err == nil {
			return st.Type.Name() + " cannot share extents"
		}
		return "the filesystem cannot share extents"
	case errors.Is(err, syscall.EINVAL):
		return "the template and the disks do not agree on chattr +C (see lsattr)"
	}
	return ""
}
