// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// Fill is a content for a new filesystem: tar archives that the guest unpacks into it. The
// numbers are what the caller found in the archives. They decide the VM's memory and time; the guest
// unpacks what there is.
type Fill struct {
	guest.Content
	Archive *os.File      // the archives; the VM only reads it; it need not have a name
	Layers  []guest.Layer // where they are in it, bottom first
	Entries int64         // in all layers
	Bytes   int64         // of file content in all layers, without holes
}

// content is what decides the bytes. A nil Fill has none.
func (f *Fill) content() *guest.Content {
	if f == nil {
		return nil
	}
	return &f.Content
}

// layers are what the guest unpacks.
func (f *Fill) layers() []guest.Layer {
	if f == nil {
		return nil
	}
	return f.Layers
}

// check returns an error unless the archives lie within their file.
func (f *Fill) check() error {
	if f == nil {
		return nil
	}
	fi, err := f.Archive.Stat()
	if err != nil {
		return fmt.Errorf("the archives of the content: %w", err)
	}
	if len(f.Layers) == 0 {
		return errors.New("the content has no archive")
	}
	for i, l := range f.Layers {
		if l.Offset < 0 || l.Length < 0 || l.Length > fi.Size() || l.Offset > fi.Size()-l.Length {
			return fmt.Errorf("layer %d of the content, %d bytes at %d, does not lie within its file of %d bytes",
				i+1, l.Length, l.Offset, fi.Size())
		}
	}
	return nil
}

// archived is the length of all archives, in bytes.
func (f *Fill) archived() (sum int64) {
	for _, l := range f.Layers {
		sum += l.Length
	}
	return sum
}

const (
	// perEntry is the memory that an entry takes of the VM, in bytes, with a reserve of half. The
	// checkers need most. For 200,000 files of up to 8 KiB (ru_maxrss): e2fsck -fn 13 MiB,
	// xfs_repair -n 143 MiB, btrfs check 182 MiB.
	perEntry = 2 << 10
	// maxMemoryMiB bounds what one content takes of the node. It is enough for 900,000 entries.
	maxMemoryMiB = 2048

	// A VM that unpacks more slowly than this counts as one that hangs. Under TCG on a loaded
	// two-core machine 1.6 ms an entry and 40 MiB a second were seen, and five times less when
	// other VMs ran beside it.
	slowestBytes = 2 << 20 // a second
	slowestEntry = 20 * time.Millisecond
)

// memory is what the VM needs beside memoryMiB, in MiB.
func (f *Fill) memory() int { return int(f.entries() * perEntry >> 20) }

// entries is a number that one can calculate with.
func (f *Fill) entries() int64 { return min(max(f.Entries, 0), math.MaxInt32) }

// time is what the VM needs beside the time of an empty filesystem.
func (f *Fill) time() time.Duration {
	return time.Duration(f.archived()/slowestBytes)*time.Second + time.Duration(f.entries())*slowestEntry
}

// give hands a content to the VM that unpacks it, with the memory and the time for that. The VM has
// the archives by a descriptor of their own that cannot write.
func (v *vm) give(f *Fill) error {
	if f == nil {
		return nil
	}
	v.memory = min(v.memory+f.memory(), maxMemoryMiB)
	v.timeout += f.time()
	var err error
	v.content, err = again(f.Archive)
	return err
}

// addressSpace bounds QEMU's, in bytes.
func (v *vm) addressSpace() int64 {
	return qemuAddressSpace + int64(max(0, v.memory-memoryMiB))<<20
}

// tooSmall returns the failure of a content that did not fit. What was unpacked until then is the
// least that the reader has to make room for.
func (o outcome) tooSmall() error {
	v, spec := o.verdict, o.orders[0].spec
	what, remedy := "no space is left", "give the volume a larger size"
	if v.Full == guest.FullInodes {
		what, remedy = "all inodes are in use", "give the volume a larger size, or a smaller bytes-per-inode"
	}
	unpacked := fmt.Sprintf("%d entries with %s", v.Entries, size.Format(v.Bytes))
	if f := o.orders[0].fill; f != nil {
		unpacked = fmt.Sprintf("%d of %d entries with %s of %s", v.Entries, f.Entries, size.Format(v.Bytes), size.Format(f.Bytes))
	}
	return fmt.Errorf("%w: %w: in %s %s after %s; %s", ErrFormat, ErrTooSmall, spec, what, unpacked, remedy)
}
