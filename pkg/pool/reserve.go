// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
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
// If a layer has no space left, or cannot reserve any, Reserve returns [ErrFull].
func (p *Pool) Reserve(image *os.File, bytes int64) error {
	if err := sparse.Reserve(image, bytes); err != nil {
		return Full(err)
	}
	if err := p.CanReserve(); err != nil {
		return err
	}
	parts := []sparse.Extent{{Start: 0, End: bytes}}
	at := image
	for _, file := range p.layers.files {
		below, exact, err := behind(at, parts)
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

// CanReserve returns [ErrFull], with the reason, if some layer cannot reserve space.
func (p *Pool) CanReserve() error {
	if d := p.layers.hidden; d != "" {
		return fmt.Errorf("%w for thick volumes: the pool is on %s, a file that the plugin cannot open; show it that file at the same path, or use provisioning: thin", ErrFull, d)
	}
	at := p.dir
	for _, file := range p.layers.files {
		copies, err := copiesOnWrite(file)
		if err != nil {
			return err
		}
		if copies {
			return fmt.Errorf("%w for thick volumes: the pool is in %s on btrfs, where each write takes new space; replace it by a copy that was made with chattr +C, or use provisioning: thin",
				ErrFull, file.Name())
		}
		wants, err := wantsSpace(at, file)
		if err != nil {
			return err
		}
		if wants {
			return fmt.Errorf("%w for thick volumes: the pool is a btrfs in the sparse file %s, and btrfs writes its metadata to new places, which may have no space there; run `fallocate -l $(stat -c %%s %[2]s) %[2]s` and mount it with the option nodiscard, or use provisioning: thin",
				ErrFull, file.Name())
		}
		at = file
	}
	return nil
}

// wantsSpace reports whether the filesystem that f is on may want space of the file that holds
// it for each write, whatever it has reserved. xfs and ext4 repeat later what they could not
// write of their metadata. A btrfs becomes read-only.
func wantsSpace(f, file *os.File) (bool, error) {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.Btrfs {
		return false, err
	}
	length, allocated, err := measure(file)
	if err != nil || allocated < length {
		return true, err
	}
	on, err := mount.Holding(f)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(strings.Split(on.VFSOptions, ","), func(option string) bool { return strings.HasPrefix(option, "discard") }), nil
}

// copiesOnWrite reports whether writing to a file takes new space although it has its space.
func copiesOnWrite(f *os.File) (bool, error) {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.Btrfs {
		return false, err
	}
	flags, err := fsctl.Flags(f)
	return flags&fsctl.NoCOW == 0, err
}

// Unreserved is the part of the first bytes of an image that lacks space: in the pool, or in
// the layer below that lacks most. A layer that does not tell counts as complete: what is
// below a btrfs, and a tmpfs.
func (p *Pool) Unreserved(image *os.File, bytes int64) (int64, error) {
	_, allocated, err := measure(image)
	if err != nil {
		return 0, err
	}
	missing := max(0, bytes-allocated)
	parts := []sparse.Extent{{Start: 0, End: bytes}}
	at := image
	for _, file := range p.layers.files {
		below, exact, err := behind(at, parts)
		if err != nil || !exact {
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

// behind tells where parts of a file lie on its filesystem's device, and so in the file behind
// that device. It is not exact where only the filesystem knows: see package fiemap.
func behind(f *os.File, parts []sparse.Extent) (below []sparse.Extent, exact bool, err error) {
	st, err := fsctl.StatusOf(f)
	if err != nil || st.Type != fsctl.XFS && st.Type != fsctl.Ext4 {
		return nil, false, err
	}
	for _, part := range parts {
		for e, err := range within(f, part) {
			if err != nil || e.Physical < 0 {
				return nil, false, err
			}
			below = append(below, sparse.Extent{Start: e.Physical, End: e.Physical + e.Length})
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
