// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"fmt"
	"math"
	"math/bits"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Limits are for the inline volumes of this node. In each field 0 means no limit. A volume
// counts with its whole size, however much of it is written.
type Limits struct {
	Size                int64 // bytes of one volume
	Volumes             int
	VolumesPerNamespace int
	Bytes               int64
	BytesPerNamespace   int64
}

// CheckSize returns [diskfs.ErrOutOfRange] for an inline volume that is too large.
func (l Limits) CheckSize(bytes int64) error {
	if l.Size == 0 || bytes <= l.Size {
		return nil
	}
	return fmt.Errorf("%w: volume attribute size %s: an inline volume may have at most %s (--max-inline-size); ask for less, use a claim, or have the operator raise the flag",
		diskfs.ErrOutOfRange, size.Format(bytes), size.Format(l.Size))
}

// usage counts inline volumes.
type usage struct {
	volumes int
	bytes   int64
}

// with adds a volume. The sum of bytes stops at the largest int64: two thousand of the
// largest volumes would overflow it, and seem to be none.
func (u usage) with(bytes int64) usage {
	return usage{u.volumes + 1, min(u.bytes, math.MaxInt64-bytes) + bytes}
}

// tally is a usage that volumes can also be taken from. So it does not stop at the largest
// int64: its sum of bytes has 128 bits.
type tally struct {
	volumes   int
	high, low uint64
}

func (t *tally) add(bytes int64) {
	t.volumes++
	var carry uint64
	t.low, carry = bits.Add64(t.low, uint64(bytes), 0)
	t.high += carry
}

func (t *tally) sub(bytes int64) {
	t.volumes--
	var borrow uint64
	t.low, borrow = bits.Sub64(t.low, uint64(bytes), 0)
	t.high -= borrow
}

func (t tally) usage() usage {
	if t.high > 0 || t.low > math.MaxInt64 {
		return usage{t.volumes, math.MaxInt64}
	}
	return usage{t.volumes, int64(t.low)}
}

// refuse returns [errdefs.ErrLimit] if one more volume is too much for its namespace or the
// node, given what they have without it.
func (l Limits) refuse(namespace string, bytes int64, ofNamespace, ofNode usage) error {
	beyond := func(limit, sum int64) bool { return limit > 0 && sum > limit }
	switch ns, node := ofNamespace.with(bytes), ofNode.with(bytes); {
	case beyond(int64(l.VolumesPerNamespace), int64(ns.volumes)):
		return fmt.Errorf("%w: --max-inline-volumes-per-namespace %d: namespace %q has %d inline volumes on this node; delete pods with inline volumes in this namespace, or have the operator raise the flag",
			errdefs.ErrLimit, l.VolumesPerNamespace, namespace, ofNamespace.volumes)
	case beyond(l.BytesPerNamespace, ns.bytes):
		return fmt.Errorf("%w: --max-inline-bytes-per-namespace %s: namespace %q has %s in inline volumes on this node and asks for %s more; ask for less, delete pods with inline volumes in this namespace, or have the operator raise the flag",
			errdefs.ErrLimit, size.Format(l.BytesPerNamespace), namespace, size.Format(ofNamespace.bytes), size.Format(bytes))
	case beyond(int64(l.Volumes), int64(node.volumes)):
		return fmt.Errorf("%w: --max-inline-volumes %d: this node has %d inline volumes, %d of them of namespace %q; delete pods with inline volumes, or have the operator raise the flag",
			errdefs.ErrLimit, l.Volumes, ofNode.volumes, ofNamespace.volumes, namespace)
	case beyond(l.Bytes, node.bytes):
		return fmt.Errorf("%w: --max-inline-bytes %s: this node has %s in inline volumes, %s of it of namespace %q, which asks for %s more; ask for less, delete pods with inline volumes, or have the operator raise the flag",
			errdefs.ErrLimit, size.Format(l.Bytes), size.Format(ofNode.bytes), size.Format(ofNamespace.bytes), namespace, size.Format(bytes))
	}
	return nil
}
