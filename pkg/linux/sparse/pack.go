// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sparse

import (
	"cmp"
	"context"
	"os"
	"slices"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
)

const (
	// fewParts is how many parts with data a packed image has, if filledShare allows it.
	fewParts = 16
	// filledShare is which part of its data a packed image may take more for holes that are filled.
	// The far copies of a large filesystem's superblock must not cost gigabytes.
	filledShare = 8
)

// Pack returns an image with the content of f and few extents. That is f itself if it has at most as many as
// few says; else a file from newFile, into which the content was copied part by part. It returns the number
// of its extents too. The caller closes both files. Each extent costs every clone 10 to 24 µs.
//
// The holes between parts are the largest ones that the image had. Smaller ones are filled with
// zeros. The packed image takes their space once, and its clones share it.
func Pack(ctx context.Context, newFile func() (*os.File, error), f *os.File, few int) (*os.File, int, error) {
	had, err := fiemap.Count(f)
	if err != nil || had <= few {
		return f, had, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	var all []Extent
	for e, err := range Data(f) {
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
		return nil, 0, err
	}
	return packed, has, nil
}

// copyParts copies parts of a file to an empty one, which gets the given size. Each part gets its
// space at once, so that it is in as few pieces as the pool's free space allows.
func copyParts(ctx context.Context, dst, src *os.File, size int64, parts []Extent) (extents int, err error) {
	if err := SetLength(dst, size); err != nil {
		return 0, err
	}
	for _, p := range parts {
		if err := ReserveRange(dst, p); err != nil {
			return 0, err
		}
		if err := CopyRange(ctx, dst, src, p); err != nil {
			return 0, err
		}
	}
	return fiemap.Count(dst)
}

// parts joins ranges across the smallest holes between them, until there are n, or the holes
// come to more than their share of the data.
func parts(ranges []Extent, n int) []Extent {
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
	var joined []Extent
	first := 0
	for _, i := range append(order, len(ranges)) {
		joined = append(joined, Extent{Start: ranges[first].Start, End: ranges[i-1].End})
		first = i
	}
	return joined
}
