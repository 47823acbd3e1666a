// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
)

// Provisioning says how a volume gets its space. Everything that differs between thin and
// thick volumes is in this file.
//
// A thin volume shares extents with its template or source, and takes space when it is
// written to. A thick volume has all of its space from the start, in extents of its own and
// in all layers below the pool, and keeps it. Its device refuses discards. Copies of it share no extents with it, because its
// next write to a shared extent would need new space.
type Provisioning bool

// The kinds of provisioning. On disk thick is the boolean "thick" of a [Record].
const (
	Thin  Provisioning = false
	Thick Provisioning = true
)

func (p Provisioning) String() string {
	if p == Thick {
		return "thick"
	}
	return "thin"
}

// ParseProvisioning reads "thin" or "thick". An empty text means thin. The error begins with
// the quoted text, so that the caller can put the name of its field before it.
func ParseProvisioning(s string) (Provisioning, error) {
	for _, p := range []Provisioning{Thin, Thick} {
		if s == p.String() {
			return p, nil
		}
	}
	if s == "" {
		return Thin, nil
	}
	return Thin, fmt.Errorf("%.64q: must be one of %s, %s", s, Thin, Thick)
}

// Fill makes an empty file exactly so many bytes long, with the content of src. A thin volume
// shares the extents of src. A thick one reserves its space and copies src.
//
// src need not have that length. A pod can change the length of its disk.img, and a plugin
// that was killed while it expanded a volume leaves an image longer than its record says.
// What src has behind that length is left out, and what it lacks reads as zeros.
func (s *Store) Fill(ctx context.Context, p Provisioning, dst, src *os.File, bytes int64) error {
	if p == Thin {
		// The whole of src is cloned, and cut here: the pod may change src meanwhile.
		if err := reflink.Clone(dst, src); err != nil {
			return err
		}
		return sparse.SetLength(dst, bytes)
	}
	if err := s.pool.Reserve(dst, bytes); err != nil {
		return err
	}
	return sparse.CopyBegin(ctx, dst, src, bytes)
}

// Extend makes a volume's file larger, and never smaller. For a thick volume it reserves the
// missing space.
func (s *Store) Extend(p Provisioning, f *os.File, bytes int64) error {
	if p == Thick {
		return s.pool.Reserve(f, bytes)
	}
	return sparse.Extend(f, bytes)
}

// SharesExtents reports whether a copy of the volume may share its extents.
func (p Provisioning) SharesExtents() bool { return p == Thin }

// NeedsFreeSpace reports whether writing to the volume takes new space of the pool.
func (p Provisioning) NeedsFreeSpace() bool { return p == Thin }

// Reserves reports whether the volume's space is reserved when it is made.
func (p Provisioning) Reserves() bool { return p == Thick }

// TakesTime reports whether making the volume copies data. That may take longer than the
// caller has time.
func (p Provisioning) TakesTime() bool { return p == Thick }

// Promise is what a volume of the given bytes needs from the pool: a promise that may be
// overcommitted (thin), one that may not (firm), and space at once (now), all in bytes.
func (p Provisioning) Promise(bytes int64) (thin, firm, now int64) {
	if p == Thick {
		return 0, bytes, bytes
	}
	return bytes, 0, 0
}

// CopyCost is the space that copying the volume takes at once, in bytes, given what the
// volume has allocated. A copy that shares extents takes nothing. Any other takes what the
// volume may overwrite meanwhile, and space for the copy itself, which a thick copy has
// reserved already.
func (p Provisioning) CopyCost(allocated int64, into Provisioning) int64 {
	switch {
	case p == Thin:
		return 0
	case into == Thick:
		return allocated
	}
	return 2 * allocated
}

// Device adds what the volume needs to the options of its loop device. A thick volume's
// device refuses discards, which would punch holes into its space.
func (p Provisioning) Device(o loopdev.Options) loopdev.Options {
	o.NoDiscard = p == Thick
	return o
}

// Retire is called for a loop device that the volume no longer uses. It removes a device
// that refuses discards, because other volumes cannot use it.
func (p Provisioning) Retire(device int) error {
	if p == Thin {
		return nil
	}
	return loopdev.Remove(device)
}

// RetiresDevices reports whether [Provisioning.Retire] does anything.
func (p Provisioning) RetiresDevices() bool { return p == Thick }

// Unreserved is the part of a thick volume's space that it lacks, in the pool or in a layer
// below, in bytes. For a thin volume it is 0.
func (s *Store) Unreserved(img *Image) (int64, error) {
	if img.Record.Provisioning == Thin {
		return 0, nil
	}
	return s.pool.Unreserved(img.File, img.Record.Spec.Size)
}

// Refill reserves again the space that a thick volume has lost: the kernel writes zeros to a
// loop device by punching holes, and ext4 makes it do so. A failure is only logged, because
// the volume can be used on a full pool too. Kubelet asks for a volume's figures every
// minute, and each time the plugin calls this.
func (s *Store) Refill(img *Image) {
	if missing, err := s.Unreserved(img); err != nil || missing == 0 {
		return
	}
	if err := s.pool.Reserve(img.File, img.Record.Spec.Size); err != nil {
		logs.Warn("A thick volume has lost space that cannot be reserved again", "err", err, "volume", img.ID())
	}
}

// Allocated is the space that a file takes in the pool, in bytes, shared extents included.
func Allocated(f *os.File) (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512, nil
}
