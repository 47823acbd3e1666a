// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

var btrfs = Filesystem{
	Name:    "btrfs",
	Package: "btrfs-progs",
	Mkfs:    "mkfs.btrfs",
	Checker: "btrfs",
	Modules: []string{"btrfs"},
	// The least that metadata-profile=dup needs. single would go down to 45 MiB, but there
	// nodesize=65536 leaves no room for one file.
	MinSize:  109 * MiB,
	MaxSize:  MaxSize,
	maxLabel: 255,
	// There are no ROMountData: a read-only mount writes only to replay a log, and a clean
	// filesystem has no log.
	options: []option{
		oneOf("nodesize", "4096", "16384", "32768", "65536"),
		oneOf("metadata-profile", "single", "dup"),
	},
	mkfs:  btrfsMkfs,
	check: []string{"check", "--readonly"},
	identify: func(r io.ReaderAt) (Superblock, error) {
		s, err := readBtrfs(r, btrfsPrimary)
		return s.Superblock, err
	},
	verify:      verifyBtrfs,
	newIdentity: newIdentityBtrfs,
}

// btrfsMkfs returns mkfs's arguments. Metadata is single, where mkfs's default is dup: a second copy
// in the same file of the same pool protects against little, and doubles every metadata write. single
// takes 4308 KiB in 3 extents, dup 4680 KiB in 5 or 6 (du -k, filefrag), at 300 MiB, 1 GiB and 100 GiB
// alike. The sector size is given since the default is the page size of the machine that formats. -K,
// since there is nothing to discard; the numbers are the same without it.
func btrfsMkfs(opts map[string]string) []string {
	profile := "single"
	if v, ok := opts["metadata-profile"]; ok {
		profile = v
	}
	args := []string{"-f", "-K", "-s", "4096", "-m", profile}
	if v, ok := opts["nodesize"]; ok {
		args = append(args, "-n", v)
	}
	return args
}

// Offsets in struct btrfs_super_block, include/uapi/linux/btrfs_tree.h.
const (
	btrfsFSID         = 0x20
	btrfsBytenr       = 0x30
	btrfsFlags        = 0x38
	btrfsMagic        = 0x40
	btrfsLogRoot      = 0x60
	btrfsTotalBytes   = 0x70
	btrfsNumDevices   = 0x88
	btrfsSectorSize   = 0x90
	btrfsIncompat     = 0xbc
	btrfsCsumType     = 0xc4
	btrfsDevSize      = 0xc9 + 8  // dev_item.total_bytes
	btrfsDevFSID      = 0xc9 + 82 // dev_item.fsid
	btrfsLabel        = 0x12b
	btrfsLabelSize    = 256
	btrfsMetadataUUID = 0x23b

	btrfsMagicValue = "_BHRfS_M"
	btrfsCRC32C     = 0 // BTRFS_CSUM_TYPE_CRC32

	// BTRFS_FEATURE_INCOMPAT_METADATA_UUID: tree blocks contain metadata_uuid, not fsid.
	btrfsIncompatMetadataUUID = 1 << 10
	// BTRFS_HEADER_FLAG_WRITTEN and _RELOC. Every other flag of a superblock means an error, a
	// seed device, a metadata dump or an unfinished change of fsid.
	btrfsHarmlessFlags = 1<<0 | 1<<1
)

// btrfsPrimary and btrfsMirrors are the positions of the superblocks: btrfs_sb_offset.
const btrfsPrimary = 64 << 10

var btrfsMirrors = []int64{64 << 20, 256 << 30}

// btrfsSuper is a superblock whose magic, place, checksum and geometry are good.
type btrfsSuper struct {
	Superblock
	raw []byte
	at  int64
}

func readBtrfs(r io.ReaderAt, off int64) (btrfsSuper, error) {
	b, err := read(r, off, blockSize)
	if err != nil {
		return btrfsSuper{}, err
	}
	return parseBtrfs(b, off)
}

func parseBtrfs(b []byte, off int64) (btrfsSuper, error) {
	le := binary.LittleEndian
	if m := b[btrfsMagic : btrfsMagic+8]; string(m) != btrfsMagicValue {
		return btrfsSuper{}, corrupt("magic is %q, want %q", m, btrfsMagicValue)
	}
	if t := le.Uint16(b[btrfsCsumType:]); t != btrfsCRC32C {
		return btrfsSuper{}, corrupt("csum_type is %d, want %d (crc32c)", t, btrfsCRC32C)
	}
	if got, want := le.Uint32(b), crc32c(b[btrfsFSID:]); got != want {
		return btrfsSuper{}, corrupt("csum is %#x, want %#x", got, want)
	}
	if at := le.Uint64(b[btrfsBytenr:]); at != uint64(off) {
		return btrfsSuper{}, corrupt("bytenr is %d, want %d", at, off)
	}
	s := btrfsSuper{raw: b, at: off}
	if err := s.checkGeometry(); err != nil {
		return btrfsSuper{}, err
	}
	s.Superblock = Superblock{
		UUID:      uuid.UUID(b[btrfsFSID : btrfsFSID+16]),
		Label:     cString(b[btrfsLabel : btrfsLabel+btrfsLabelSize]),
		Size:      int64(le.Uint64(b[btrfsTotalBytes:])),
		slack:     blockSize,
		BlockSize: blockSize,
	}
	return s, nil
}

func (s *btrfsSuper) checkGeometry() error {
	le := binary.LittleEndian
	if n := le.Uint64(s.raw[btrfsNumDevices:]); n != 1 {
		return corrupt("num_devices is %d, want 1", n)
	}
	if n := le.Uint32(s.raw[btrfsSectorSize:]); n != blockSize {
		return corrupt("sectorsize is %d, want %d", n, blockSize)
	}
	total, device := le.Uint64(s.raw[btrfsTotalBytes:]), le.Uint64(s.raw[btrfsDevSize:])
	if total < blockSize || total > MaxSize || total != device {
		return corrupt("total_bytes is %d and dev_item.total_bytes is %d, want equal values of at most %d", total, device, int64(MaxSize))
	}
	// btrfs_validate_super refuses anything else.
	if got, want := s.raw[btrfsDevFSID:btrfsDevFSID+16], s.metadataUUID(); !bytes.Equal(got, want) {
		return corrupt("dev_item.fsid is %x, the metadata's UUID is %x", got, want)
	}
	return nil
}

// metadataUUID returns the UUID in every tree block: the first one that the filesystem had.
func (s *btrfsSuper) metadataUUID() []byte {
	at := btrfsFSID
	if binary.LittleEndian.Uint64(s.raw[btrfsIncompat:])&btrfsIncompatMetadataUUID != 0 {
		at = btrfsMetadataUUID
	}
	return s.raw[at : at+16]
}

// mirrors returns the positions of the superblock's copies. There are as many as the device has room
// for (write_dev_supers in fs/btrfs/disk-io.c).
func (s *btrfsSuper) mirrors() []int64 {
	var at []int64
	for _, m := range btrfsMirrors {
		if m+blockSize < s.Size {
			at = append(at, m)
		}
	}
	return at
}

func verifyBtrfs(r io.ReaderAt, imageSize int64) (Superblock, error) {
	s, err := readBtrfs(r, btrfsPrimary)
	if err != nil {
		return Superblock{}, err
	}
	if s.Size != imageSize {
		return Superblock{}, corrupt("the filesystem covers %s (%d bytes), the image has %s", size.Format(s.Size), s.Size, size.Format(imageSize))
	}
	if err := s.checkPrimary(); err != nil {
		return Superblock{}, err
	}
	for _, at := range s.mirrors() {
		m, err := readBtrfs(r, at)
		if err == nil {
			err = s.checkMirror(m)
		}
		if err != nil {
			return Superblock{}, fmt.Errorf("superblock at byte %d: %w", at, err)
		}
	}
	return s.Superblock, nil
}

// checkPrimary checks that the checksum field, the flags and the log are those of a clean filesystem.
func (s *btrfsSuper) checkPrimary() error {
	le := binary.LittleEndian
	if rest := s.raw[4:btrfsFSID]; !bytes.Equal(rest, make([]byte, len(rest))) {
		return corrupt("csum is %x after the crc32c, want zeroes", rest)
	}
	if f := le.Uint64(s.raw[btrfsFlags:]); f&^btrfsHarmlessFlags != 0 {
		return corrupt("flags are %#x, want no other than %#x", f, btrfsHarmlessFlags)
	}
	if root := le.Uint64(s.raw[btrfsLogRoot:]); root != 0 {
		return fmt.Errorf("%w: log_root is %d, so a log waits for replay", ErrUnclean, root)
	}
	return nil
}

// checkMirror checks that a mirror differs from the primary only in its place and checksum, since
// every commit writes all of them. (An fsync writes the primary alone, with a log_root.)
func (s *btrfsSuper) checkMirror(m btrfsSuper) error {
	if !bytes.Equal(m.raw[4:btrfsBytenr], s.raw[4:btrfsBytenr]) || !bytes.Equal(m.raw[btrfsFlags:], s.raw[btrfsFlags:]) {
		return corrupt("it differs from the primary")
	}
	return nil
}

// newIdentityBtrfs sets fsid in every superblock. The tree blocks, and those of a log that waits for
// replay, keep the first UUID, as metadata_uuid (Linux 5.0).
func newIdentityBtrfs(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error {
	s, err := readBtrfs(src, btrfsPrimary)
	if err != nil {
		return err
	}
	for _, at := range s.mirrors() {
		m, err := readBtrfs(src, at)
		if err == nil {
			err = m.rename(dst, id)
		}
		if err != nil {
			return fmt.Errorf("superblock at byte %d: %w", at, err)
		}
	}
	return s.rename(dst, id)
}

func (s *btrfsSuper) rename(dst io.WriterAt, id uuid.UUID) error {
	le := binary.LittleEndian
	copy(s.raw[btrfsMetadataUUID:], s.metadataUUID())
	le.PutUint64(s.raw[btrfsIncompat:], le.Uint64(s.raw[btrfsIncompat:])|btrfsIncompatMetadataUUID)
	copy(s.raw[btrfsFSID:], id[:])
	le.PutUint32(s.raw, crc32c(s.raw[btrfsFSID:]))
	return write(dst, s.at, s.raw)
}
