// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"fmt"
	"math"
)

const qcowMagic = "QFI\xfb"

// qcow2Header is the beginning of a qcow2 file, in network order. What follows Snapshots is in version 3 only.
type qcow2Header struct {
	Magic              [4]byte
	Version            uint32
	BackingOffset      uint64
	BackingSize        uint32
	ClusterBits        uint32
	Size               uint64
	Crypt              uint32
	L1Size             uint32
	L1Offset           uint64
	RefcountOffset     uint64
	RefcountClusters   uint32
	SnapshotCount      uint32
	Snapshots          uint64
	Incompatible       uint64
	Compatible, Autocl uint64
	RefcountOrder      uint32
	HeaderLength       uint32
}

// Incompatible features: "An implementation must fail to open an image if an unknown bit is set."
const (
	featureCorrupt      = 1 << 1
	featureExternalData = 1 << 2
	// featuresKnown are a file that was not closed, whose counters are wrong and not needed, another compression, and
	// clusters in parts.
	featuresKnown = 1<<0 | featureCorrupt | featureExternalData | 1<<3 | 1<<4
)

// The types of header extensions that matter here.
const (
	extensionEnd          = 0
	extensionBacking      = 0xe2792aca
	extensionExternalData = 0x44415441
	extensionEncryption   = 0x0537be77
)

const (
	headerLength2, headerLength3 = 72, 104
	minClusterBits               = 9
	maxClusterBits               = 21
	// maxL1 is QEMU's bound, in entries of 8 bytes.
	maxL1 = 32 << 20 / 8
)

// qcow2Size checks the header of a qcow2 file, and returns the size of the disk. Internal snapshots are allowed and
// ignored: the disk is what it is now.
func qcow2Size(head []byte) (int64, error) {
	padded := make([]byte, max(len(head), headerLength3))
	copy(padded, head)
	var h qcow2Header
	if _, err := binary.Decode(padded, binary.BigEndian, &h); err != nil {
		return 0, err
	}
	if err := h.check(len(head)); err != nil {
		return 0, err
	}
	if h.Version >= 3 {
		if err := checkExtensions(head, int(h.HeaderLength)); err != nil {
			return 0, err
		}
	} else if err := checkExtensions(head, headerLength2); err != nil {
		return 0, err
	}
	if h.Size > math.MaxInt64 {
		return math.MaxInt64, nil
	}
	return int64(h.Size), nil
}

func (h *qcow2Header) check(have int) error {
	least := headerLength2
	if h.Version >= 3 {
		least = headerLength3
	}
	switch {
	case h.Version != 2 && h.Version != 3:
		return unusable("it is a qcow image of version %d; %s", h.Version, convertHint)
	case have < least:
		return unusable("its qcow2 header ends after %d bytes; the file is truncated", have)
	case h.BackingOffset != 0 || h.BackingSize != 0:
		return unusable("it has a backing file, and only whole disks are converted; %s, which includes it", convertHint)
	case h.Crypt != 0:
		return unusable("it is encrypted; %s", convertHint)
	case h.ClusterBits < minClusterBits || h.ClusterBits > maxClusterBits:
		return unusable("its qcow2 header is damaged: clusters of 2^%d bytes", h.ClusterBits)
	case h.L1Size > maxL1:
		return unusable("its qcow2 header is damaged: a table of %d entries", h.L1Size)
	case h.Version == 2:
		return nil
	}
	return h.checkFeatures()
}

func (h *qcow2Header) checkFeatures() error {
	switch {
	case h.Incompatible&featureExternalData != 0:
		return unusable("its data are in another file; %s, which includes them", convertHint)
	case h.Incompatible&featureCorrupt != 0:
		return unusable("it is marked as corrupt; see `qemu-img check`")
	case h.Incompatible&^featuresKnown != 0:
		return unusable("it has qcow2 features that are not known (%#x); %s", h.Incompatible&^featuresKnown, convertHint)
	case h.HeaderLength < headerLength3 || h.HeaderLength > headSize || h.HeaderLength%8 != 0:
		return unusable("its qcow2 header is damaged: it has %d bytes", h.HeaderLength)
	}
	return nil
}

// checkExtensions looks for extensions that name another file, whatever the header says. They end in the first
// cluster, of which head has what there can be.
func checkExtensions(head []byte, at int) error {
	for at+8 <= len(head) {
		kind := binary.BigEndian.Uint32(head[at:])
		length := binary.BigEndian.Uint32(head[at+4:])
		switch kind {
		case extensionEnd:
			return nil
		case extensionBacking, extensionExternalData:
			return unusable("its qcow2 header names another file, and only whole disks are converted; %s", convertHint)
		case extensionEncryption:
			return unusable("it is encrypted; %s", convertHint)
		}
		if length > headSize {
			return unusable("its qcow2 header is damaged: an extension of %d bytes", length)
		}
		at += 8 + int(length+7)/8*8
	}
	return nil
}

func unusable(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnusable}, args...)...)
}
