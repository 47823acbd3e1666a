// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"cmp"
	"context"
	"os"
	"slices"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

const (
	// fewExtents is how many extents an image may have that stays as it is. Each costs every clone
	// 10 to 24 µs.
	fewExtents = 32
	// manyExtents are those that take a clone a millisecond or two: about as long as all the rest of
	// a publish on demand, on a fast disk. It is logged, since a packed image rarely has so many.
	manyExtents = 100
	// fewParts is how many parts with data a packed image has, if filledShare allows it.
	fewParts = 16
	// filledShare is which part of its data a packed image may take more for holes that are filled.
	// The far copies of a large filesystem's superblock must not cost gigabytes.
	filledShare = 8
)

// pack returns an image with the content of f and few extents. That is f itself if it has few;
// else a file from newFile, into which the content was copied part by part. It returns the number
// of its extents too. The caller closes both files.
//
// The holes between parts are the largest ones that the image had. Smaller ones are filled with
// zeros. The template takes their space once, and its clones share it.
func pack(ctx context.Context, newFile func() (*os.File, error), f *os.File) (*os.File, int, error) {
	had, err := fiemap.Count(f)
	if err != nil || had <= fewExtents {
		return f, had, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	var all []sparse.Extent
	for e, err := range sparse.Data(f) {
		if err != nil {
			return nil, 0, err
		}
		all = append(all, e)
	}
	packed, err := newFile()
	if err != nil {
		return nil, 0, err
	}
	has, err := copyParts(ctx, packed, f, fi.Size(), parts(all, fewParts))
	if err != nil {
		packed.Close()
		return nil, 0, pool.Full(err)
	}
	return packed, has, nil
}

// copyParts copies parts of a file to an empty one, which gets the given size. Each part gets its
// space at once, so that it is in as few pieces as the pool's free space allows.
func copyParts(ctx context.Context, dst, src *os.File, size int64, parts []sparse.Extent) (extents int, err error) {
	if err := sparse.SetLength(dst, size); err != nil {
		return 0, err
	}
	for _, p := range parts {
		if err := sparse.ReserveRange(dst, p); err != nil {
			return 0, err
		}
		if err := sparse.CopyRange(ctx, dst, src, p); err != nil {
			return 0, err
		}
	}
	return fiemap.Count(dst)
}

// parts joins ranges across the smallest holes between them, until there are n, or the holes
// come to more than their share of the data.
func parts(ranges []sparse.Extent, n int) []sparse.Extent {
	if len(ranges) <= n {
		return ranges
	}
	hole := func(i int) int64 { return ranges[i].Start - ranges[i-1].End } // before range i
	data, order := int64(0), make([]int, 0, len(ranges))
	for i, r := range ranges {
		data += r.End - r.Start
		if i > 0 {
			order = append(order, i)
		}
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(hole(a), hole(b)) })
	filled := int64(0)
	for len(order) >= n && filled+hole(order[0]) <= data/filledShare {
		filled += hole(order[0])
		order = order[1:]
	}
	slices.Sort(order)
	var joined []sparse.Extent
	first := 0
	for _, i := range append(order, len(ranges)) {
		joined = append(joined, sparse.Extent{Start: ranges[first].Start, End: ranges[i-1].End})
		first = i
	}
	return joined
}
