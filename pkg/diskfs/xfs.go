// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"

	"github.com/google/uuid"
)

var xfs = Filesystem{
	Name:     "xfs",
	Package:  "xfsprogs",
	Mkfs:     "mkfs.xfs",
	Checker:  "xfs_repair",
	Modules:  []string{"xfs"},
	MinSize:  300 * MiB, // mkfs.xfs(8), since 5.19: "Filesystem must be larger than 300MB."
	MaxSize:  MaxSize,
	maxLabel: 12,
	// A clone has an identity of its own, so nouuid should be unnecessary. It is a second
	// safeguard, since xfs refuses to mount two filesystems with one UUID.
	MountData:   []string{"nouuid"},
	ROMountData: []string{"norecovery"}, // xfs(5): no log recovery
	options: []option{
		oneOf("inode-size", "512", "1024", "2048"),
		oneOf("rmapbt", "0", "1"),
		oneOf("bigtime", "0", "1"),
	},
	mkfs:        xfsMkfs,
	check:       []string{"-n"},
	identify:    func(r io.ReaderAt) (Superblock, error) { s, err := readXFS(r, 0); return s.Superblock, err },
	verify:      verifyXFS,
	newIdentity: newIdentityXFS,
}

// xfsMkfs returns mkfs's arguments. Sectors have 4 KiB, since direct I/O over a reflinked xfs file
// is not possible with 512 bytes. -K, since there is nothing to discard. It changed neither the
// number of extents (6, filefrag) nor the 64 MiB allocated for the zeroed log, at 300 MiB, 1 GiB
// and 100 GiB alike. QEMU's detect-zeroes turns that log into a hole.
func xfsMkfs(opts map[string]string) []string {
	args := []string{"-f", "-K", "-b", "size=4096", "-s", "size=4096"}
	if v, ok := opts["inode-size"]; ok {
		args = append(args, "-i", "size="+v)
	}
	for _, key := range []string{"rmapbt", "bigtime"} {
		if v, ok := opts[key]; ok {
			args = append(args, "-m", key+"="+v)
		}
	}
	return args
}

// Offsets in struct xfs_dsb, fs/xfs/libxfs/xfs_format.h. All but the checksum is big-endian.
const (
	xfsMagic       = 0
	xfsBlockSize   = 4
	xfsDBlocks     = 8
	xfsUUID        = 32
	xfsLogStart    = 48
	xfsAGBlocks    = 84
	xfsAGCount     = 88
	xfsLogBlocks   = 96
	xfsVersion     = 100
	xfsSectorSize  = 102
	xfsInodeSize   = 104
	xfsLabel       = 108
	xfsAGBlkLog    = 124
	xfsInProgress  = 126
	xfsCompat      = 208 // then ro_compat, incompat: three words
	xfsIncompat    = 216
	xfsCRC         = 224
	xfsMetaUUID    = 248
	xfsMagicValue  = "XFSB"
	xfsMinAGBlocks = 64 // XFS_MIN_AG_BLOCKS
	// xfsAGHeaders is the number of sectors, here blocks, at the start of an allocation group:
	// superblock, xfs_agf, xfs_agi, xfs_agfl.
	xfsAGHeaders = 4

	// XFS_SB_FEAT_INCOMPAT_META_UUID: metadata contains sb_meta_uuid, not sb_uuid.
	xfsIncompatMetaUUID = 1 << 2
	// XFS_SB_FEAT_INCOMPAT_NEEDSREPAIR: the kernel refuses to mount.
	xfsIncompatNeedsRepair = 1 << 4

	// xfsSlack bounds the space that mkfs leaves unused at the end: it drops a last allocation
	// group of less than XFS_AG_MIN_BYTES.
	xfsSlack = 16 * MiB
)

// xfsSuper is a superblock whose magic, checksum and geometry are good.
type xfsSuper struct {
	Superblock
	raw      []byte // one sector, which is also one block
	agBlocks int64
	agCount  int64
	logAt    int64 // position of the log in the image, bytes
	logSize  int64 // bytes
}

// readXFS reads the superblock at off. Allocation group 0 has the primary, every other one a copy.
func readXFS(r io.ReaderAt, off int64) (xfsSuper, error) {
	b, err := read(r, off, blockSize)
	if err != nil {
		return xfsSuper{}, err
	}
	return parseXFS(b)
}

func parseXFS(b []byte) (xfsSuper, error) {
	be := binary.BigEndian
	if m := b[xfsMagic : xfsMagic+4]; string(m) != xfsMagicValue {
		return xfsSuper{}, corrupt("sb_magicnum is %q, want %q", m, xfsMagicValue)
	}
	if v := be.Uint16(b[xfsVersion:]) & 0xf; v != 5 {
		return xfsSuper{}, corrupt("sb_versionnum is %d, want 5, which has a checksum", v)
	}
	if bs, ss := be.Uint32(b[xfsBlockSize:]), be.Uint16(b[xfsSectorSize:]); bs != blockSize || ss != blockSize {
		return xfsSuper{}, corrupt("sb_blocksize is %d, sb_sectsize is %d, want %d for both", bs, ss, blockSize)
	}
	if got, want := binary.LittleEndian.Uint32(b[xfsCRC:]), zeroedCRC(b, xfsCRC); got != want {
		return xfsSuper{}, corrupt("sb_crc is %#x, want %#x", got, want)
	}
	s := xfsSuper{raw: b, agBlocks: int64(be.Uint32(b[xfsAGBlocks:])), agCount: int64(be.Uint32(b[xfsAGCount:]))}
	s.Superblock = Superblock{
		UUID:      uuid.UUID(b[xfsUUID : xfsUUID+16]),
		Label:     cString(b[xfsLabel : xfsLabel+12]),
		slack:     xfsSlack,
		BlockSize: blockSize,
	}
	if err := s.checkGeometry(be.Uint64(b[xfsDBlocks:])); err != nil {
		return xfsSuper{}, err
	}
	return s, s.findLog()
}

// zeroedCRC returns the checksum of b with the 4 bytes at hole taken as zero, as
// xfs_start_cksum_safe in fs/xfs/libxfs/xfs_cksum.h computes it.
func zeroedCRC(b []byte, hole int) uint32 {
	crc := crc32c(b[:hole])
	crc = crc32.Update(crc, castagnoli, make([]byte, 4))
	return crc32.Update(crc, castagnoli, b[hole+4:])
}

func (s *xfsSuper) checkGeometry(blocks uint64) error {
	if blocks < 1 || blocks > MaxSize/blockSize {
		return corrupt("sb_dblocks is %d, want 1 to %d", blocks, int64(MaxSize/blockSize))
	}
	s.Size = int64(blocks) * blockSize
	if s.agBlocks < xfsMinAGBlocks || s.agCount != (int64(blocks)+s.agBlocks-1)/s.agBlocks {
		return corrupt("sb_agcount is %d and sb_agblocks is %d, which does not fit sb_dblocks, %d", s.agCount, s.agBlocks, blocks)
	}
	return nil
}

// findLog finds the log by sb_logstart. That is an xfs_fsblock_t: the number of the allocation
// group, and in the low sb_agblklog bits the number of a block in it (XFS_FSB_TO_AGNO,
// XFS_FSB_TO_AGBNO).
func (s *xfsSuper) findLog() error {
	start := binary.BigEndian.Uint64(s.raw[xfsLogStart:])
	blocks := int64(binary.BigEndian.Uint32(s.raw[xfsLogBlocks:]))
	shift := s.raw[xfsAGBlkLog]
	if want := bits.Len64(uint64(s.agBlocks - 1)); int(shift) != want {
		return corrupt("sb_agblklog is %d, want %d", shift, want)
	}
	group, block := start>>shift, int64(start&(1<<shift-1))
	// A log must not overlap a copy of the superblock: the copy's new identity would
	// overwrite the record's.
	if block < xfsAGHeaders || blocks == 0 || group >= uint64(s.agCount) || block+blocks > s.agBlocks {
		return corrupt("sb_logstart is %#x and sb_logblocks is %d, want a log inside one allocation group", start, blocks)
	}
	s.logAt = (int64(group)*s.agBlocks + block) * blockSize
	s.logSize = blocks * blockSize
	return nil
}

func (s *xfsSuper) copyAt(group int64) int64 { return group * s.agBlocks * blockSize }

func verifyXFS(r io.ReaderAt, bytes int64) (Superblock, error) {
	s, err := readXFS(r, 0)
	if err != nil {
		return Superblock{}, err
	}
	if err := s.covers(bytes); err != nil {
		return Superblock{}, err
	}
	if s.raw[xfsInProgress] != 0 {
		return Superblock{}, corrupt("sb_inprogress is %d: mkfs or growfs did not finish", s.raw[xfsInProgress])
	}
	if f := binary.BigEndian.Uint32(s.raw[xfsIncompat:]); f&xfsIncompatNeedsRepair != 0 {
		return Superblock{}, corrupt("sb_features_incompat %#x says that the filesystem needs repair", f)
	}
	for group := int64(1); group < s.agCount; group++ {
		if err := s.checkCopy(r, group); err != nil {
			return Superblock{}, fmt.Errorf("superblock of allocation group %d: %w", group, err)
		}
	}
	if _, err := s.unmountRecord(r); err != nil {
		return Superblock{}, err
	}
	return s.Superblock, nil
}

// checkCopy compares the fields that a copy must share with the primary. Counters, the root inode
// and sb_inprogress may differ: mkfs leaves sb_inprogress set in copies.
func (s *xfsSuper) checkCopy(r io.ReaderAt, group int64) error {
	c, err := readXFS(r, s.copyAt(group))
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name    string
		at, len int
	}{
		{"sb_dblocks", xfsDBlocks, 8},
		{"sb_uuid", xfsUUID, 16},
		{"sb_logstart", xfsLogStart, 8},
		{"sb_agblocks and sb_agcount", xfsAGBlocks, 8},
		{"sb_logblocks", xfsLogBlocks, 4},
		{"sb_inodesize", xfsInodeSize, 2},
		{"sb_fname", xfsLabel, 12},
		{"sb_features_compat, _ro_compat, _incompat", xfsCompat, 12},
		{"sb_meta_uuid", xfsMetaUUID, 16},
	} {
		if got, want := c.raw[f.at:f.at+f.len], s.raw[f.at:f.at+f.len]; !bytes.Equal(got, want) {
			return corrupt("%s is %x, the primary's is %x", f.name, got, want)
		}
	}
	return nil
}

// newIdentityXFS sets sb_uuid everywhere, and the UUID of the one log record that the kernel looks
// at. The metadata keeps the first UUID, as sb_meta_uuid.
func newIdentityXFS(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error {
	s, err := readXFS(src, 0)
	if err != nil {
		return err
	}
	record, err := s.unmountRecord(src)
	if errors.Is(err, ErrUnclean) {
		return fmt.Errorf("%w; mount the image once with nouuid, so that the kernel replays the log, unmount it, then try again", err)
	}
	if err != nil {
		return err
	}
	if err := renameXFSRecord(src, dst, record, id); err != nil {
		return err
	}
	for group := s.agCount - 1; group > 0; group-- {
		c, err := readXFS(src, s.copyAt(group))
		if err == nil {
			err = c.rename(dst, s.copyAt(group), id)
		}
		if err != nil {
			return fmt.Errorf("superblock of allocation group %d: %w", group, err)
		}
	}
	return s.rename(dst, 0, id)
}

func (s *xfsSuper) rename(dst io.WriterAt, off int64, id uuid.UUID) error {
	features := binary.BigEndian.Uint32(s.raw[xfsIncompat:])
	if features&xfsIncompatMetaUUID == 0 {
		copy(s.raw[xfsMetaUUID:], s.raw[xfsUUID:xfsUUID+16])
		binary.BigEndian.PutUint32(s.raw[xfsIncompat:], features|xfsIncompatMetaUUID)
	}
	copy(s.raw[xfsUUID:], id[:])
	binary.LittleEndian.PutUint32(s.raw[xfsCRC:], zeroedCRC(s.raw, xfsCRC))
	return write(dst, off, s.raw)
}
