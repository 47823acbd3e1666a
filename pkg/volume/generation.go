// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// generations make what goldens consist of.
type generations struct {
	pool    *pool.Pool
	goldens *golden.Store
	copies  *copies
}

// prepare makes what a generation has of a file with a filesystem: a clone of it, with another identity, without the
// mark, trimmed, and in few pieces. Where the mark is the condition and is missing, it returns [errUnmarked].
func (g generations) prepare(ctx context.Context, src *os.File, spec diskfs.Spec, when image.CommitWhen) (_ *os.File, id uuid.UUID, err error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return nil, id, err
	}
	f, err := g.goldens.New()
	if err != nil {
		return nil, id, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := reflink.Clone(f, src); err != nil {
		return nil, id, pool.Full(err)
	}
	if err := sparse.SetLength(f, spec.Size); err != nil {
		return nil, id, pool.Full(err)
	}
	id = uuid.New()
	if err := g.copies.newIdentity(f, fs.Name, id); err != nil {
		return nil, id, err
	}
	if err := g.inside(f, fs, id, func(root *os.File) error { return clean(root, when) }); err != nil {
		return nil, id, g.pool.FullIfNoRoom(err)
	}
	return g.packed(ctx, f, id)
}

// inside mounts the filesystem of a new generation, and calls do with its root. That it can be mounted is the proof that
// others can start from it. The kernel reports nothing that it cannot write when it unmounts, so that is looked for
// afterwards: such an image is not clean, and gets no identity.
func (g generations) inside(f *os.File, fs *diskfs.Filesystem, id uuid.UUID, do func(root *os.File) error) error {
	err := g.copies.mounted(f, fs, "commit", func(mnt *mount.Detached) error {
		root, err := mount.Open(mnt.File())
		if err != nil {
			return err
		}
		defer root.Close()
		if err := do(root); err != nil {
			return err
		}
		return fsctl.Sync(root)
	})
	if err != nil {
		return err
	}
	if err := fs.NewIdentity(f, f, id); err != nil {
		return fmt.Errorf("after it was unmounted: %w", err)
	}
	return nil
}

// clean removes the mark, and gives back what is free.
func clean(root *os.File, when image.CommitWhen) error {
	if err := removeMark(root); err != nil && (when == image.CommitMarked || !errors.Is(err, errUnmarked)) {
		return err
	}
	err := fsctl.Trim(root, fsctl.Everything, 0)
	if errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return err
}

// removeMark removes the mark, and its directory if that is empty then.
func removeMark(root *os.File) error {
	dir, err := markDir(root)
	if err != nil {
		return err
	}
	err = openat.Remove(dir, image.CommitName)
	if err := errors.Join(err, dir.Close()); err != nil {
		return err
	}
	err = mount.RmdirTarget(root, image.CommitDir)
	if errors.Is(err, syscall.ENOTEMPTY) {
		err = nil
	}
	return err
}

// extentBytes is for how much of its data a generation may have one extent more. With it, cloning takes up to a
// millisecond for each GiB. To have fewer extents, all data would have to be copied, and shared with no other image.
const extentBytes = 16 * size.MiB

// packed returns an image with few extents: f itself, if it has few, or if there is no room for another one.
func (g generations) packed(ctx context.Context, f *os.File, id uuid.UUID) (*os.File, uuid.UUID, error) {
	allocated, err := image.Allocated(f)
	if err != nil {
		return nil, id, err
	}
	if s, err := g.pool.Space(); err != nil || s.Available < 2*allocated {
		return f, id, err
	}
	packed, _, err := sparse.Pack(ctx, g.goldens.New, f, max(fewExtents, int(allocated/extentBytes)))
	if err = pool.Full(err); errors.Is(err, pool.ErrFull) {
		return f, id, nil
	}
	if err == nil && packed != f {
		err = f.Close()
	}
	return packed, id, err
}

// fewExtents is how many extents any generation may have.
const fewExtents = 32
