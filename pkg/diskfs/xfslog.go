// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/google/uuid"
)

// The log of an xfs is a ring of 512-byte "basic blocks" (fs/xfs/libxfs/xfs_log_format.h). The
// first word of a block is its cycle, the number of the trip round the ring on which it was
// written. Only a record's header has a magic number there, and its cycle in the next word.
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

	// xlogMaxRecord bounds an unmount record, in basic blocks: 8 of headers, and one
	// operation that is padded to the largest log stripe unit, 256 KiB.
	xlogMaxRecord = 8 + 256*1024/xlogBlock
)

// unmountRecord finds the unmount record at the head of a clean log, and returns the position of
// its header in the image. It does what xlog_find_head and xlog_check_unmount_rec of
// fs/xfs/xfs_log_recover.c do, but does not care for writes that a crash left out of order: such
// a log is unclean in any case. So a log that only the kernel calls clean is refused, and no log
// is accepted that the kernel calls unclean.
//
// No other record matters. In a clean log the kernel checks the UUID of the last header only
// (xlog_header_check_mount), and moves the tail behind it, so older records are never replayed.
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

// logHead finds the block where the next record would go. That is where the cycle drops, and it
// is found by a binary search.
func (s *xfsSuper) logHead(r io.ReaderAt, n int64) (int64, error) {
	first, err := s.logCycle(r, 0)
	if err != nil {
		return 0, err
	}
	if first == 0 {
		return 0, corrupt("the log begins with zeroes, but mkfs writes an unmount record there")
	}
	last, err := s.logCycle(r, n-1)
	if err != nil {
		return 0, err
	}
	if first == last {
		return 0, nil // the last record ends with the ring
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

// checkUnmount checks that a record is one unmount operation and belongs to this filesystem. Its
// header is at block at of n, and it ends back blocks later, at the head.
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
		return fmt.Errorf("%w: the last log record, at log block %d, has no unmount operation", ErrUnclean, at)
	}
	return nil
}

// renameXFSRecord sets the UUID in the log record header at off. It sets h_crc to 0, which means
// that there is no checksum: "mkfs always sets old_crc to 0 so we must consider this valid even on
// v5 supers" (xlog_recover_process).
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
