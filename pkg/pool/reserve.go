// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"math"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
)

// Reserve makes sure that the first bytes of an image have space, in the pool and in all
// layers below it. A smaller image becomes so large. Where an image has its space already,
// this takes some microseconds for each of its extents.
//
// The physical offsets of an image's extents are offsets in the file behind the pool's loop
// device. btrfs has addresses of its own, so below a btrfs the whole file must have space: see
// [Pool.CanReserve].
//
// If a layer has no space left, Reserve returns [ErrFull], and if it cannot reserve any,
// [ErrCannotReserve].
func (p *Pool) Reserve(image *os.File, bytes int64) error {
	if err := p.CanReserve(); err != nil {
		return err
	}
	if err := sparse.Reserve(image, bytes); err != nil {
		return Full(err)
	}
	parts := []sparse.Extent{{Start: 0, End: bytes}}
	at := image
	for _, file := range p.layers.files {
		below, exact, err := behind(at, parts, math.MaxInt)
		if err != nil {
			return err
		}
		if !exact {
			if below, err = whole(file); err != nil {
				return err
			}
		}
		for _, part := range below {
			if err := sparse.ReserveRange(file, part); err != nil {
				return Full(fmt.Errorf("below the pool: %w", err))
			}
		}
		at, parts = file, below
	}
	return nil
}

// ErrCannotReserve means that the pool, or a layer below it, cannot reserve space for thick
// volumes.
var ErrCannotReserve = errors.New("the pool cannot reserve space for thick volumes")

// CanReserve returns [ErrCannotReserve], with the reason, if some layer cannot reserve space. It
// returns [ErrUnusable] for a pool that fails [Pool.Check].
func (p *Pool) CanReserve() error {
	if err := p.Check(); err != nil {
		return err
	}
	if d := p.layers.hidden; d != "" {
		return health.Advise(fmt.Errorf("%w: it is on %s, which the plugin cannot look into", ErrCannotReserve, d), showFile+", or use provisioning: thin")
	}
	volumes, err := openat.Open(p.dir, volumesDir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer volumes.Close()
	if keeps, err := keepsSpace(volumes); err != nil || !keeps {
		return cmp.Or(err, health.Advise(fmt.Errorf("%w: on btrfs each write to a file in %s takes new space", ErrCannotReserve, volumes.Name()),
			"make a pool whose directories have chattr +C, or use provisioning: thin"))
	}
	at := p.dir
	for _, file := range p.layers.files {
		keeps, err := keepsSpace(file)
		if err != nil {
			return err
		}
		if !keeps {
			return health.Advise(fmt.Errorf("%w: it is in %s, on a filesystem where a write may take new space", ErrCannotReserve, file.Name()),
				"put the file on ext4 or xfs, or on btrfs with chattr +C, or use provisioning: thin")
		}
		wants, err := wantsSpace(at, file)
		if err != nil {
			return err
		}
		if wants {
			return health.Advise(
				fmt.Errorf("%w: it is a btrfs in the sparse file %s, and btrfs writes its metadata to new places, which may have no space there", ErrCannotReserve, file.Name()),
				fmt.Sprintf("run `fallocate -l $(stat -c %%s %[1]s) %[1]s`, mount it with the option nodiscard, and restart the plugin, or use provisioning: thin", file.Name()))
		}
		at = file
	}
	return nil
}

// showFile is what to do about a loop device that cannot be looked into.
const showFile = "attach the whole file to the device, and show the plugin the file at the same path"

// wantsSpace reports whether the filesystem that f is on may want space of the file that holds
// it for each write, whatever it has reserved. xfs and ext4 repeat later what they could not
// write of their metadata. A btrfs becomes read-only.
func wantsSpace(f, file *os.File) (bool, error) {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.Btrfs {
		return false, err
	}
	if full, err := filled(file); err != nil || !full {
		return true, err
	}
	on, err := mount.Holding(f)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(strings.Split(on.Options, ","), func(option string) bool { return strings.HasPrefix(option, "discard") }), nil
}

// keepsSpace reports whether a file, or one that is made in a directory, is overwritten in its
// place, so that space that was reserved for it is enough.
func keepsSpace(f *os.File) (bool, error) {
	st, err := fsctl.StatusOf(f)
	if err != nil {
		return false, err
	}
	switch st.Type {
	case fsctl.XFS, fsctl.Ext4, fsctl.Tmpfs:
		return true, nil
	case fsctl.Btrfs:
		flags, err := fsctl.Flags(f)
		return flags&fsctl.NoCOW != 0, err
	}
	return false, nil
}

// Unreserved is the part of the first bytes of an image that lacks space: in the pool, or in
// the layer below that lacks most. A layer that does not tell counts as complete: what is
// below a btrfs, and a tmpfs. So does the layer below an image that its pod has broken into very
// many pieces: kubelet asks each minute, and a pod must not decide what that costs.
func (p *Pool) Unreserved(image *os.File, bytes int64) (int64, error) {
	_, allocated, err := measure(image)
	if err != nil {
		return 0, err
	}
	missing := max(0, bytes-allocated)
	parts := []sparse.Extent{{Start: 0, End: bytes}}
	at := image
	for _, file := range p.layers.files {
		below, exact, err := behind(at, parts, manyPieces)
		if err != nil || !exact || len(below) > manyPieces {
			return missing, err
		}
		lacks, err := holes(file, below)
		if errors.Is(err, errors.ErrUnsupported) {
			return missing, nil
		}
		if err != nil {
			return 0, err
		}
		missing = max(missing, lacks)
		at, parts = file, below
	}
	return missing, nil
}

// manyPieces is how many pieces of an image are looked up below the pool, which takes some 10 ms.
// An image whose space was reserved at once has a few.
const manyPieces = 10_000

// behind tells where parts of a file lie on its filesystem's device, and so in the file behind
// that device. It is not exact where only the filesystem knows: see package fiemap. It stops
// after more than most pieces.
func behind(f *os.File, parts []sparse.Extent, most int) (below []sparse.Extent, exact bool, err error) {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.XFS && st.Type != fsctl.Ext4 {
		return nil, false, err
	}
	for _, part := range parts {
		for e, err := range within(f, part) {
			if err != nil || e.Physical < 0 {
				return nil, false, err
			}
			end := e.Physical + e.Length
			if last := len(below) - 1; last >= 0 && below[last].End == e.Physical {
				below[last].End = end
				continue
			}
			if below = append(below, sparse.Extent{Start: e.Physical, End: end}); len(below) > most {
				return below, true, nil
			}
		}
	}
	return below, true, nil
}

// holes is how much of the parts of a file has no space, in bytes.
func holes(f *os.File, parts []sparse.Extent) (bytes int64, err error) {
	for _, part := range parts {
		bytes += part.End - part.Start
		for e, err := range within(f, part) {
			if err != nil {
				return 0, err
			}
			bytes -= e.Length
		}
	}
	return bytes, nil
}

// within yields the extents of a part of a file, cut where they reach beyond it.
func within(f *os.File, part sparse.Extent) iter.Seq2[fiemap.Extent, error] {
	return func(yield func(fiemap.Extent, error) bool) {
		for e, err := range fiemap.Extents(f, part.Start, part.End) {
			if before := part.Start - e.Logical; err == nil && before > 0 {
				e.Logical, e.Length = e.Logical+before, e.Length-before
				if e.Physical >= 0 {
					e.Physical += before
				}
			}
			if err == nil {
				e.Length = min(e.Length, part.End-e.Logical)
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func whole(f *os.File) ([]sparse.Extent, error) {
	length, _, err := measure(f)
	return []sparse.Extent{{Start: 0, End: length}}, err
}
