// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"

	"github.com/google/uuid"
)

var ext4 = Filesystem{
	Name:    "ext4",
	Package: "e2fsprogs",
	Mkfs:    "mkfs.ext4",
	Checker: "e2fsck",
	Modules: []string{"ext4"},
	// Below 8 MiB mkfs leaves out the journal and only remarks on it. At 8 MiB there is no
	// room for one with inode-size=1024 and bytes-per-inode=2048.
	MinSize: 9 * MiB,
	// e2fsck keeps bitmaps of every block. In 256 MiB of memory it checks 8 TiB; at 15 TiB the
	// kernel kills it.
	MaxSize:     8 << 40,
	maxLabel:    16,
	ROMountData: []string{"noload"}, // ext4(5): do not load the journal, so that it is not replayed
	// Without its journal nothing is written twice, and the image has no blocks of it.
	FillMountData: []string{"noload"},
	options: []option{
		oneOf("inode-size", "256", "512", "1024"),
		number("bytes-per-inode", "a power of two", 1024, 64*MiB, func(n int) bool { return n&(n-1) == 0 }),
		number("reserved-percent", "a whole number", 0, 50, func(int) bool { return true }),
		oneOf("journal", "on", "off"),
	},
	mkfs:        ext4Mkfs,
	check:       []string{"-fn"},
	Grower:      "resize2fs",
	repair:      []string{"-fp"},
	conflict:    ext4Conflict,
	identify:    func(r io.ReaderAt) (Superblock, error) { sb, err := readExt4(r); return sb.Superblock, err },
	verify:      verifyExt4,
	newIdentity: newIdentityExt4,
}

// ext4Mkfs returns mkfs's arguments. They give few extents, since a clone costs a little per extent
// and nothing per byte, and leave nothing for the kernel to initialise in every clone. Measured for
// 100 GiB on a loop device (space: du -k; extents: filefrag):
//
//	default features and options             529 MiB  72 extents
//	lazy_itable_init=0, packed_meta_blocks   1605 MiB  37 extents
//	assume_storage_prezeroed alone             5 MiB  68 extents
//	both, as here                              5 MiB  20 extents
//
// assume_storage_prezeroed (e2fsprogs 1.47) sets ITABLE_ZEROED in every group without writing the
// tables. nodiscard, since there is nothing to discard. metadata_csum_seed makes a new identity
// cheap: without it the checksum of every block depends on the UUID. No sparse_super2: with it the
// kernel refuses to resize online. -m 0, as Kubernetes' mount-utils format: blocks reserved for root
// are of no use to a pod.
func ext4Mkfs(opts map[string]string) []string {
	features := "metadata_csum,metadata_csum_seed"
	if opts["journal"] == "off" {
		features += ",^has_journal"
	}
	reserved := "0"
	if v, ok := opts["reserved-percent"]; ok {
		reserved = v
	}
	args := []string{"-F", "-q", "-b", "4096", "-m", reserved, "-O", features,
		"-E", "assume_storage_prezeroed=1,nodiscard,packed_meta_blocks=1"}
	if v, ok := opts["inode-size"]; ok {
		args = append(args, "-I", v)
	}
	if v, ok := opts["bytes-per-inode"]; ok {
		args = append(args, "-i", v)
	}
	return args
}

// ext4Conflict refuses inode tables as large as the image, with which mkfs fails.
func ext4Conflict(opts map[string]string) error {
	size, _ := strconv.Atoi(opts["inode-size"])
	ratio, err := strconv.Atoi(opts["bytes-per-inode"])
	if err == nil && ratio <= size {
		return fmt.Errorf("%w: ext4 option bytes-per-inode=%d must be more than inode-size=%d", ErrInvalid, ratio, size)
	}
	return nil
}

// Offsets in struct ext4_super_block: Documentation/filesystems/ext4/super.rst.
const (
	ext4SuperAt   = 1024 // the primary's position in the image; a copy is at the start of its block group
	ext4SuperSize = 1024

	ext4BlocksLo       = 0x4
	ext4FirstDataBlock = 0x14
	ext4LogBlockSize   = 0x18
	ext4LogClusterSize = 0x1c
	ext4BlocksPerGroup = 0x20
	ext4InodesPerGroup = 0x28
	ext4Magic          = 0x38
	ext4State          = 0x3a
	ext4InodeSize      = 0x58
	ext4GroupNumber    = 0x5a
	ext4Compat         = 0x5c
	ext4Incompat       = 0x60
	ext4ROCompat       = 0x64
	ext4UUID           = 0x68
	ext4Label          = 0x78
	ext4ReservedGDT    = 0xce
	ext4LastOrphan     = 0xe8
	ext4DescSize       = 0xfe
	ext4BlocksHi       = 0x150
	ext4ChecksumType   = 0x175
	ext4ChecksumSeed   = 0x270
	ext4Checksum       = 0x3fc
)

// Values and feature bits, fs/ext4/ext4.h.
const (
	ext4MagicValue = 0xef53
	ext4CRC32C     = 1

	ext4StateValid = 0x1 // EXT4_VALID_FS
	ext4StateError = 0x2 // EXT4_ERROR_FS

	ext4CompatSparseSuper2   = 0x200
	ext4IncompatRecover      = 0x4
	ext4Incompat64Bit        = 0x80
	ext4IncompatCsumSeed     = 0x2000
	ext4ROCompatSparseSuper  = 0x1
	ext4ROCompatBigalloc     = 0x200
	ext4ROCompatMetadataCsum = 0x400
	ext4ROCompatOrphans      = 0x10000 // EXT4_FEATURE_RO_COMPAT_ORPHAN_PRESENT
)

// ext4Super is a superblock whose magic, checksum and geometry are good.
type ext4Super struct {
	Superblock
	raw       []byte
	blocks    int64
	perGroup  int64 // blocks per group
	groups    int64
	compat    uint32
	incompat  uint32
	roCompat  uint32
	seedKnown bool // metadata_csum_seed: block checksums do not depend on the UUID
}

func readExt4(r io.ReaderAt) (ext4Super, error) {
	b, err := read(r, ext4SuperAt, ext4SuperSize)
	if err != nil {
		return ext4Super{}, err
	}
	return parseExt4(b)
}

func parseExt4(b []byte) (ext4Super, error) {
	le := binary.LittleEndian
	if m := le.Uint16(b[ext4Magic:]); m != ext4MagicValue {
		return ext4Super{}, corrupt("s_magic is %#x, want %#x", m, ext4MagicValue)
	}
	s := ext4Super{
		raw:      b,
		compat:   le.Uint32(b[ext4Compat:]),
		incompat: le.Uint32(b[ext4Incompat:]),
		roCompat: le.Uint32(b[ext4ROCompat:]),
		blocks:   int64(le.Uint32(b[ext4BlocksLo:])),
		perGroup: int64(le.Uint32(b[ext4BlocksPerGroup:])),
	}
	if err := s.checkFeatures(); err != nil {
		return ext4Super{}, err
	}
	if s.incompat&ext4Incompat64Bit != 0 {
		s.blocks |= int64(le.Uint32(b[ext4BlocksHi:])) << 32
	}
	if err := s.checkGeometry(); err != nil {
		return ext4Super{}, err
	}
	s.groups = (s.blocks + s.perGroup - 1) / s.perGroup
	s.seedKnown = s.incompat&ext4IncompatCsumSeed != 0
	s.Superblock = Superblock{
		UUID:      uuid.UUID(b[ext4UUID : ext4UUID+16]),
		Label:     cString(b[ext4Label : ext4Label+16]),
		Size:      s.blocks * blockSize,
		slack:     s.maxSlack(),
		BlockSize: blockSize,
	}
	return s, nil
}

// checkFeatures checks the features that decide where the copies of the superblock are and that
// there is a checksum, and the checksum itself.
func (s *ext4Super) checkFeatures() error {
	le := binary.LittleEndian
	if s.roCompat&ext4ROCompatMetadataCsum == 0 || s.raw[ext4ChecksumType] != ext4CRC32C {
		return corrupt("the superblock has no checksum: the feature metadata_csum with crc32c is missing")
	}
	if got, want := le.Uint32(s.raw[ext4Checksum:]), ext4CRC(s.raw); got != want {
		return corrupt("s_checksum is %#x, want %#x", got, want)
	}
	// meta_bg is allowed. It moves descriptors and no superblock, and the kernel turns to it when
	// it grows a filesystem beyond the descriptors that mkfs has reserved.
	if s.roCompat&ext4ROCompatSparseSuper == 0 || s.roCompat&ext4ROCompatBigalloc != 0 ||
		s.compat&ext4CompatSparseSuper2 != 0 {
		return corrupt("features (compat %#x, incompat %#x, ro_compat %#x) must include sparse_super, and neither sparse_super2 nor bigalloc",
			s.compat, s.incompat, s.roCompat)
	}
	return nil
}

func (s *ext4Super) checkGeometry() error {
	le := binary.LittleEndian
	if l := le.Uint32(s.raw[ext4LogBlockSize:]); l != 2 || le.Uint32(s.raw[ext4LogClusterSize:]) != l || le.Uint32(s.raw[ext4FirstDataBlock:]) != 0 {
		return corrupt("s_log_block_size is %d, want 2, which means blocks of 4096 bytes", l)
	}
	// One block of bitmap must cover a group.
	if s.perGroup < 1 || s.perGroup > 8*blockSize {
		return corrupt("s_blocks_per_group is %d, want 1 to %d", s.perGroup, 8*blockSize)
	}
	if s.blocks < 1 || s.blocks > MaxSize/blockSize {
		return corrupt("blocks count is %d, want 1 to %d", s.blocks, int64(MaxSize/blockSize))
	}
	return nil
}

// ext4CRC returns crc32c(~0, all before s_checksum), not inverted at the end, as
// ext4_superblock_csum in fs/ext4/super.c does.
func ext4CRC(b []byte) uint32 { return ^crc32c(b[:ext4Checksum]) }

// backupGroups returns the groups with a copy of the superblock: 1 and the powers of 3, 5 and 7
// (ext4_bg_has_super). There are 14 of them in 100 GiB.
func (s *ext4Super) backupGroups() []int64 {
	var groups []int64
	if s.groups > 1 {
		groups = append(groups, 1)
	}
	for _, base := range []int64{3, 5, 7} {
		for g := base; g < s.groups; g *= base {
			groups = append(groups, g)
		}
	}
	slices.Sort(groups)
	return groups
}

// backupAt returns a copy's position in the image. Blocks of 4 KiB are counted from 0, so the copy is
// at the start of its block and of its group.
func (s *ext4Super) backupAt(group int64) int64 { return group * s.perGroup * blockSize }

func verifyExt4(r io.ReaderAt, bytes int64) (Superblock, error) {
	s, err := readExt4(r)
	if err != nil {
		return Superblock{}, err
	}
	if err := s.covers(bytes); err != nil {
		return Superblock{}, err
	}
	if !s.seedKnown {
		return Superblock{}, corrupt("the feature metadata_csum_seed is missing: clones could not get an identity of their own")
	}
	if err := s.checkClean(); err != nil {
		return Superblock{}, err
	}
	for _, group := range s.backupGroups() {
		if err := s.checkBackup(r, group); err != nil {
			return Superblock{}, fmt.Errorf("superblock of group %d: %w", group, err)
		}
	}
	return s.Superblock, nil
}

// maxSlack bounds the space that mkfs leaves unused at the end, in bytes. It drops a last group that
// has no room for its own metadata and 50 blocks of data (ext2fs_initialize in e2fsprogs
// lib/ext2fs/initialize.c).
func (s *ext4Super) maxSlack() int64 {
	le := binary.LittleEndian
	desc := int64(32)
	if s.incompat&ext4Incompat64Bit != 0 {
		desc = int64(le.Uint16(s.raw[ext4DescSize:]))
	}
	inodes := int64(le.Uint32(s.raw[ext4InodesPerGroup:])) * int64(le.Uint16(s.raw[ext4InodeSize:]))
	tables := inodes/blockSize + 1
	descriptors := s.groups*desc/blockSize + 2
	return (3 + tables + descriptors + int64(le.Uint16(s.raw[ext4ReservedGDT:])) + 50) * blockSize
}

// checkClean checks that the filesystem was unmounted, without errors, with nothing to replay and
// without orphans.
func (s *ext4Super) checkClean() error {
	le := binary.LittleEndian
	state := le.Uint16(s.raw[ext4State:])
	if state&ext4StateError != 0 {
		return corrupt("s_state is %#x: the kernel found errors", state)
	}
	if state&ext4StateValid == 0 || s.incompat&ext4IncompatRecover != 0 ||
		s.roCompat&ext4ROCompatOrphans != 0 || le.Uint32(s.raw[ext4LastOrphan:]) != 0 {
		return fmt.Errorf("%w: s_state %#x, s_feature_incompat %#x, s_feature_ro_compat %#x", ErrUnclean, state, s.incompat, s.roCompat)
	}
	return nil
}

// checkBackup compares the fields that a copy must share with the primary. Counters, times and state
// may differ: the kernel keeps them in the primary only.
func (s *ext4Super) checkBackup(r io.ReaderAt, group int64) error {
	b, err := read(r, s.backupAt(group), ext4SuperSize)
	if err != nil {
		return err
	}
	if _, err := parseExt4(b); err != nil {
		return err
	}
	// s_block_group_nr has 16 bits. mkfs writes the largest value for all groups beyond it.
	if n := binary.LittleEndian.Uint16(b[ext4GroupNumber:]); int64(n) != min(group, math.MaxUint16) {
		return corrupt("s_block_group_nr is %d, want %d", n, min(group, math.MaxUint16))
	}
	for _, f := range []struct {
		name    string
		at, len int
	}{
		{"s_blocks_count_lo", ext4BlocksLo, 4},
		{"s_blocks_count_hi", ext4BlocksHi, 4},
		{"s_blocks_per_group", ext4BlocksPerGroup, 4},
		{"s_inodes_per_group", ext4InodesPerGroup, 4},
		{"s_inode_size", ext4InodeSize, 2},
		{"s_feature_compat, _incompat, _ro_compat", ext4Compat, 12},
		{"s_uuid", ext4UUID, 16},
		{"s_volume_name", ext4Label, 16},
		{"s_desc_size", ext4DescSize, 2},
		{"s_checksum_seed", ext4ChecksumSeed, 4},
	} {
		if got, want := b[f.at:f.at+f.len], s.raw[f.at:f.at+f.len]; !bytes.Equal(got, want) {
			return corrupt("%s is %x, the primary's is %x", f.name, got, want)
		}
	}
	return nil
}

// newIdentityExt4 sets s_uuid in every superblock. The UUID is nowhere else: block checksums are
// seeded with s_checksum_seed, which stays crc32c(~0, first UUID).
func newIdentityExt4(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error {
	s, err := readExt4(src)
	if err != nil {
		return err
	}
	if !s.seedKnown {
		return fmt.Errorf("%w: without the feature metadata_csum_seed every checksum depends on the UUID; set it with tune2fs -U, or format anew", errors.ErrUnsupported)
	}
	// The journal may contain blocks of the superblock, with the old UUID.
	if s.incompat&ext4IncompatRecover != 0 {
		return fmt.Errorf("%w: the journal's replay would bring the old UUID back; mount and unmount the image once, then try again", ErrUnclean)
	}
	for _, group := range s.backupGroups() {
		if err := renameExt4(src, dst, s.backupAt(group), 0, id); err != nil {
			return fmt.Errorf("superblock of group %d: %w", group, err)
		}
	}
	return renameExt4(src, dst, 0, ext4SuperAt, id)
}

// renameExt4 sets the UUID of the superblock at off in the block at blockAt. It checks only the magic
// of a copy: the kernel does not promise to keep the checksums of copies, and renameExt4 corrects a
// stale one.
func renameExt4(src io.ReaderAt, dst io.WriterAt, blockAt int64, off int, id uuid.UUID) error {
	block, err := read(src, blockAt, blockSize)
	if err != nil {
		return err
	}
	b := block[off : off+ext4SuperSize]
	if m := binary.LittleEndian.Uint16(b[ext4Magic:]); m != ext4MagicValue {
		return corrupt("s_magic is %#x, want %#x", m, ext4MagicValue)
	}
	copy(b[ext4UUID:], id[:])
	binary.LittleEndian.PutUint32(b[ext4Checksum:], ext4CRC(b))
	return write(dst, blockAt, block)
}
