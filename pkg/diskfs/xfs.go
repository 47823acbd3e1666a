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
	MaxLabel: 12,
	// A new identity makes nouuid unnecessary; it is the second belt, for xfs
	// refuses a mount rather than risk two filesystems with one UUID.
	MountData:   []string{"nouuid"},
	ROMountData: []string{"norecovery"}, // xfs(5): do not run log recovery
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

// xfsMkfs: 4 KiB sectors, since direct I/O over a reflinked xfs file is not to
// be had with 512. -K because there is nothing to discard: it changed neither
// the extents (6, filefrag) nor the 64 MiB allocated for a zeroed log, which
// QEMU's detect-zeroes turns into a hole, at 300 MiB, 1 GiB and 100 GiB alike.
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

// Where things are in struct xfs_dsb, fs/xfs/libxfs/xfs_format.h. Big-endian but
// for the checksum.
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
	// xfsAGHeaders are the sectors, here blocks, that every allocation group begins
	// with: superblock, xfs_agf, xfs_agi, xfs_agfl.
	xfsAGHeaders = 4

	// XFS_SB_FEAT_INCOMPAT_META_UUID: metadata carries sb_meta_uuid, not sb_uuid.
	xfsIncompatMetaUUID = 1 << 2
	// XFS_SB_FEAT_INCOMPAT_NEEDSREPAIR: the kernel refuses to mount.
	xfsIncompatNeedsRepair = 1 << 4

	// xfsSlack bounds what mkfs leaves unused at the end: it drops a last
	// allocation group of less than XFS_AG_MIN_BYTES.
	xfsSlack = 16 * MiB
)

// xfsSuper is a superblock whose magic, checksum and geometry are good.
type xfsSuper struct {
	Superblock
	raw      []byte // one sector, which is also one block
	agBlocks int64
	agCount  int64
	logAt    int64 // of the log in the image, bytes
	logSize  int64 // bytes
}

// readXFS reads the superblock at off: allocation group 0 has the primary, every
// other one a copy.
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
		return xfsSuper{}, corrupt("sb_versionnum is %d, want 5: no checksum proves the superblock", v)
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
		Slack:     xfsSlack,
		BlockSize: blockSize,
	}
	if err := s.checkGeometry(be.Uint64(b[xfsDBlocks:])); err != nil {
		return xfsSuper{}, err
	}
	return s, s.findLog()
}

// zeroedCRC is the checksum of b with the 4 bytes at hole taken as zero, as
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
		return corrupt("sb_agcount is %d, sb_agblocks is %d: they do not make sb_dblocks, %d", s.agCount, s.agBlocks, blocks)
	}
	return nil
}

// findLog takes sb_logstart apart: an xfs_fsblock_t has the allocation group
// above sb_agblklog bits of block number (XFS_FSB_TO_AGNO, XFS_FSB_TO_AGBNO).
func (s *xfsSuper) findLog() error {
	start := binary.BigEndian.Uint64(s.raw[xfsLogStart:])
	blocks := int64(binary.BigEndian.Uint32(s.raw[xfsLogBlocks:]))
	shift := s.raw[xfsAGBlkLog]
	if want := bits.Len64(uint64(s.agBlocks - 1)); int(shift) != want {
		return corrupt("sb_agblklog is %d, want %d", shift, want)
	}
	group, block := start>>shift, int64(start&(1<<shift-1))
	// A log over a copy of the superblock would lose its record's new UUID to that.
	if block < xfsAGHeaders || blocks == 0 || group >= uint64(s.agCount) || block+blocks > s.agBlocks {
		return corrupt("sb_logstart is %#x, sb_logblocks is %d: want a log inside one allocation group", start, blocks)
	}
	s.logAt = (int64(group)*s.agBlocks + block) * blockSize
	s.logSize = blocks * blockSize
	return nil
}

func (s *xfsSuper) copyAt(group int64) int64 { return group * s.agBlocks * blockSize }

func verifyXFS(r io.ReaderAt, size int64) (Superblock, error) {
	s, err := readXFS(r, 0)
	if err != nil {
		return Superblock{}, err
	}
	if s.Size > size || s.Short(size) {
		return Superblock{}, corrupt("the filesystem covers %d bytes, want at most %d and more than %d", s.Size, size, size-xfsSlack)
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

// checkCopy compares what a copy must share with the primary. Counters, root
// inode and sb_inprogress are not among it: mkfs leaves the latter set in copies.
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

// newIdentityXFS sets sb_uuid everywhere, and the UUID of the one log record the
// kernel looks at. The metadata keeps the first UUID, as sb_meta_uuid.
func newIdentityXFS(src io.ReaderAt, dst io.WriterAt, id uuid.UUID) error {
	s, err := readXFS(src, 0)
	if err != nil {
		return err
	}
	record, err := s.unmountRecord(src)
	if errors.Is(err, ErrUnclean) {
		return fmt.Errorf("%w: mount the image once with nouuid, so that the kernel replays the log, unmount it, then ask again", err)
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

// The log, fs/xfs/libxfs/xfs_log_format.h: a ring of 512-byte "basic blocks". The
// first word of each is the cycle, the number of the trip round the ring on
// which it was written; only a record's header has a magic number there, and its
// cycle in the next word.
const (
	xlogBlock = 512

	xlogMagicValue = 0xfeedbabe
	xlogMagic      = 0 // struct xlog_rec_header
	xlogCycle      = 4
	xlogVersion    = 8
	xlogLen        = 12
	xlogCRC        = 32
	xlogNumOps     = 40
	xlogUUID       = 304
	xlogSize       = 320

	xlogHeaderCovers = 32 * 1024 // XLOG_HEADER_CYCLE_SIZE
	xlogOpFlags      = 9         // struct xlog_op_header
	xlogUnmountTrans = 0x20      // XLOG_UNMOUNT_TRANS

	// xlogMaxRecord bounds an unmount record, in basic blocks: 8 of headers,
	// and one operation padded to the largest log stripe unit, 256 KiB.
	xlogMaxRecord = 8 + 256*1024/xlogBlock
)

// unmountRecord finds the unmount record at the head of a clean log, and returns
// where its header is in the image. It is xlog_find_head and
// xlog_check_unmount_rec of fs/xfs/xfs_log_recover.c without their care for
// writes that a crash left out of order, where a log is unclean by any reading:
// what the kernel calls clean and this does not is refused, never the reverse.
//
// No other record matters. Of a clean log the kernel checks the UUID of the
// last header only (xlog_header_check_mount), and moves the tail behind it: what
// is older is never replayed.
func (s *xfsSuper) unmountRecord(r io.ReaderAt) (int64, error) {
	n := s.logSize / xlogBlock
	head, err := s.logHead(r, n)
	if err != nil {
		return 0, err
	}
	for back := int64(1); back <= min(n, xlogMaxRecord); back++ {
		at := (head - back + n) % n
		b, err := s.logBlock(r, at)
		if err != nil {
			return 0, err
		}
		if binary.BigEndian.Uint32(b[xlogMagic:]) == xlogMagicValue {
			return s.logAt + at*xlogBlock, s.checkUnmount(r, b, at, back, n)
		}
	}
	return 0, fmt.Errorf("%w: the last log record is too long for an unmount record", ErrUnclean)
}

// logHead finds the block where the next record would go: where the cycle drops,
// by a binary search.
func (s *xfsSuper) logHead(r io.ReaderAt, n int64) (int64, error) {
	first, err := s.logCycle(r, 0)
	if err != nil {
		return 0, err
	}
	if first == 0 {
		return 0, corrupt("the log is all zeroes: mkfs writes an unmount record into it")
	}
	last, err := s.logCycle(r, n-1)
	if err != nil {
		return 0, err
	}
	if first == last {
		return 0, nil // the ring was just filled
	}
	lo, hi := int64(0), n-1 // cycle(lo) != last, cycle(hi) == last
	for hi-lo > 1 {
		mid := (lo + hi) / 2
		cycle, err := s.logCycle(r, mid)
		if err != nil {
			return 0, err
		}
		if cycle == last {
			hi = mid
		} else {
			lo = mid
		}
	}
	return hi, nil
}

func (s *xfsSuper) logBlock(r io.ReaderAt, block int64) ([]byte, error) {
	return read(r, s.logAt+block*xlogBlock, xlogBlock)
}

func (s *xfsSuper) logCycle(r io.ReaderAt, block int64) (uint32, error) {
	b, err := s.logBlock(r, block)
	if err != nil {
		return 0, err
	}
	if cycle := binary.BigEndian.Uint32(b); cycle != xlogMagicValue {
		return cycle, nil
	}
	return binary.BigEndian.Uint32(b[xlogCycle:]), nil
}

// checkUnmount: the record whose header is at block at, ending back blocks later
// at the head, is one unmount operation and belongs to this filesystem.
func (s *xfsSuper) checkUnmount(r io.ReaderAt, header []byte, at, back, n int64) error {
	be := binary.BigEndian
	if id := uuid.UUID(header[xlogUUID : xlogUUID+16]); id != s.UUID {
		return corrupt("h_fs_uuid of the last log record is %s, sb_uuid is %s", id, s.UUID)
	}
	headers := int64(1)
	if size := int64(be.Uint32(header[xlogSize:])); be.Uint32(header[xlogVersion:])&2 != 0 && size > xlogHeaderCovers {
		headers = (size + xlogHeaderCovers - 1) / xlogHeaderCovers
	}
	data := (int64(be.Uint32(header[xlogLen:])) + xlogBlock - 1) / xlogBlock
	if headers+data != back || data == 0 || be.Uint32(header[xlogNumOps:]) != 1 {
		return fmt.Errorf("%w: the last log record, at log block %d, is not an unmount record", ErrUnclean, at)
	}
	op, err := s.logBlock(r, (at+headers)%n)
	if err != nil {
		return err
	}
	if op[xlogOpFlags]&xlogUnmountTrans == 0 {
		return fmt.Errorf("%w: the last log record, at log block %d, does not unmount", ErrUnclean, at)
	}
	return nil
}

// renameXFSRecord sets the UUID in the log record header at off. h_crc becomes
// 0, which means none: "mkfs always sets old_crc to 0 so we must consider this
// valid even on v5 supers" (xlog_recover_process).
func renameXFSRecord(src io.ReaderAt, dst io.WriterAt, off int64, id uuid.UUID) error {
	at := off % blockSize
	block, err := read(src, off-at, blockSize)
	if err != nil {
		return err
	}
	header := block[at:]
	copy(header[xlogUUID:], id[:])
	clear(header[xlogCRC : xlogCRC+4])
	return write(dst, off-at, block)
}
