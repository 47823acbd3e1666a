// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"slices"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/boot"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
)

// Durability says what a sync in a volume is worth. Everything that differs between synced and
// volatile volumes is in this file.
//
// The loop device of a volatile volume drops flushes. All writes still reach the image, so
// neither the plugin's end nor that of the volume's pod loses anything. After a crash of the
// node or a power cut the image may lack any of them, and nobody can tell which. So a volatile
// volume lives in one boot of the node, whose id is in its record, and is never mounted in
// another.
//
// The option "volatile" of overlayfs promises the same: Documentation/filesystems/overlayfs.rst.
type Durability string

// The kinds of durability. In a request the empty one leaves it to the operator. In a record it
// is that of claims, of a disk.img and of volumes of older plugins, all of which are synced.
const (
	Synced   Durability = "synced"   // what was synced outlives the node
	Volatile Durability = "volatile" // nothing outlives the node
)

// Durabilities are the words for it.
var Durabilities = []Durability{Synced, Volatile}

// ParseDurability reads "synced" or "volatile". The error begins with the quoted text, so that
// the caller can put the name of its field before it.
func ParseDurability(s string) (Durability, error) {
	if d := Durability(s); slices.Contains(Durabilities, d) {
		return d, nil
	}
	return "", fmt.Errorf("%.64q: must be one of %s, %s", s, Synced, Volatile)
}

// DropsFlushes reports whether the volume's loop device drops flushes.
func (d Durability) DropsFlushes() bool { return d == Volatile }

// stamp completes a new record: with its version and, where that matters, with this boot.
func (r *Record) stamp() (err error) {
	r.Version = recordVersion
	if r.Durability == Volatile {
		r.Version = volatileVersion
	}
	if r.Durability == Volatile || r.CommitTo != "" {
		r.Boot, err = boot.ID()
	}
	return err
}

// Outlived reports whether the node has rebooted since a volume was made whose record has the boot.
func (r Record) Outlived() (bool, error) {
	id, err := boot.ID()
	return err == nil && r.Boot != id, err
}

// OfAnotherBoot reports whether a volume is volatile, and was made in another boot of the node.
// Its image may lack anything that was written to it.
func (r Record) OfAnotherBoot() (bool, error) {
	if r.Durability != Volatile {
		return false, nil
	}
	return r.Outlived()
}

// Device adds what the volume needs to the options of its loop device.
func (r Record) Device(o loopdev.Options) loopdev.Options {
	o.DropFlushes = r.Durability.DropsFlushes()
	return r.Provisioning.Device(o)
}
