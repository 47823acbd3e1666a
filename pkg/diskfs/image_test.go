// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/google/uuid"
)

const (
	sampleSize  = 300 * MiB
	sampleLabel = "data"
)

// sample is the part that this package reads of an image that mkfs made, with sampleSize and
// sampleLabel. TestSamples makes it.
type sample struct {
	fs     *Filesystem
	blocks map[int64][]byte // by offset
	supers []int64          // offsets of the superblocks, the primary's first
}

func samplePath(fs *Filesystem) string { return "testdata/" + fs.Name + ".gz" }

// readSample reads a sample's blocks. Each one follows its offset.
func readSample(t testing.TB, fs *Filesystem) sample {
	t.Helper()
	packed, err := os.Open(samplePath(fs))
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	r, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	s := sample{fs: fs, blocks: map[int64][]byte{}}
	for {
		var off int64
		if err := binary.Read(r, be, &off); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		s.blocks[off] = make([]byte, blockSize)
		if _, err := io.ReadFull(r, s.blocks[off]); err != nil {
			t.Fatal(err)
		}
	}
	for _, off := range slices.Sorted(maps.Keys(s.blocks)) {
		if s.isSuper(off) {
			s.supers = append(s.supers, off)
		}
	}
	return s
}

// inBlock returns the offset in its block at which a superblock begins.
func (s sample) inBlock(off int64) int {
	if s.fs == &ext4 && off == 0 {
		return ext4SuperAt
	}
	return 0
}

func (s sample) isSuper(off int64) bool {
	b := s.blocks[off][s.inBlock(off):]
	return bytes.HasPrefix(b, []byte(xfsMagicValue)) || string(b[btrfsMagic:btrfsMagic+8]) == btrfsMagicValue ||
		le.Uint16(b[ext4Magic:]) == ext4MagicValue
}

// seal corrects a superblock's checksum.
func (s sample) seal(b []byte) {
	switch s.fs {
	case &ext4:
		le.PutUint32(b[ext4Checksum:], ext4CRC(b[:ext4SuperSize]))
	case &xfs:
		le.PutUint32(b[xfsCRC:], zeroedCRC(b, xfsCRC))
	case &btrfs:
		le.PutUint32(b, crc32c(b[btrfsFSID:]))
	}
}

// image returns the sample with some bytes changed. Each change is a place, an offset in it, a number
// of bytes and the bytes. Place 0 is every superblock at once; the others are the blocks one by one.
func (s sample) image(t testing.TB, size int64, changes []byte, sealed bool) *image {
	m := &image{t: t, size: size, blocks: map[int64][]byte{}}
	offsets := slices.Sorted(maps.Keys(s.blocks))
	for _, off := range offsets {
		m.blocks[off] = bytes.Clone(s.blocks[off])
	}
	for len(changes) >= 4 {
		place, at, n := int(changes[0])%(len(offsets)+1), int(le.Uint16(changes[1:])), 1+int(changes[3]%8)
		value := changes[4:min(4+n, len(changes))]
		changes = changes[4+len(value):]
		if place > 0 {
			copy(m.blocks[offsets[place-1]][at%blockSize:], value)
			continue
		}
		for _, off := range s.supers {
			super := m.blocks[off][s.inBlock(off):]
			copy(super[at%ext4SuperSize:], value)
		}
	}
	for _, off := range s.supers {
		if sealed {
			s.seal(m.blocks[off][s.inBlock(off):])
		}
	}
	return m
}

// image is a sparse file in memory that checks and counts the reads and writes.
type image struct {
	t             testing.TB
	size          int64
	blocks        map[int64][]byte // by offset; a missing one reads as hole
	hole          []byte           // nil means zeroes
	reads, writes int
}

func (m *image) ReadAt(b []byte, off int64) (int, error) {
	m.reads++
	if off < 0 || len(b) > blockSize {
		m.t.Fatalf("a read of %d bytes at %d", len(b), off)
	}
	if m.reads > 2000+int(m.size/(xfsMinAGBlocks*blockSize)) { // a superblock per smallest group, and a log's end
		m.t.Fatalf("%d reads of an image of %d bytes", m.reads, m.size)
	}
	n := 0
	for n < len(b) && off+int64(n) < m.size {
		at := off + int64(n)
		block := m.blocks[at-at%blockSize]
		if block == nil {
			block = m.hole
		}
		if block == nil {
			block = zeroBlock
		}
		n += copy(b[n:min(int64(len(b)), m.size-off)], block[at%blockSize:])
	}
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

var zeroBlock = make([]byte, blockSize)

func (m *image) WriteAt(b []byte, off int64) (int, error) {
	m.writes++
	if off < 0 || off%blockSize != 0 || len(b) != blockSize || off+blockSize > m.size {
		m.t.Fatalf("a write of %d bytes at %d, to an image of %d", len(b), off, m.size)
	}
	m.blocks[off] = bytes.Clone(b)
	return len(b), nil
}

func (m *image) clone() *image {
	c := *m
	c.blocks, c.reads, c.writes = maps.Clone(m.blocks), 0, 0
	return &c
}

func (m *image) identify(fs *Filesystem) (Superblock, error) {
	m.reads = 0
	sb, err := fs.Identify(m)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		m.t.Errorf("Identify: %v, want ErrCorrupt", err)
	}
	if err == nil && (sb.Size <= 0 || sb.Size > MaxSize || sb.slack <= 0 || sb.BlockSize != blockSize) {
		m.t.Errorf("Identify accepted %+v", sb)
	}
	return sb, err
}

func (m *image) verify(fs *Filesystem, label string) (Superblock, error) {
	m.reads = 0
	sb, err := fs.Verify(m, m.size, label)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		m.t.Errorf("Verify: %v, want ErrCorrupt", err)
	}
	return sb, err
}

// rename gives dst, a clone, a new identity, and checks that the error is as documented.
func (m *image) rename(fs *Filesystem, dst *image, id uuid.UUID) error {
	m.reads, dst.writes = 0, 0
	err := fs.NewIdentity(m, dst, id)
	switch {
	case errors.Is(err, ErrUnclean), errors.Is(err, errors.ErrUnsupported):
		if dst.writes > 0 {
			m.t.Errorf("NewIdentity: %v, after %d writes", err, dst.writes)
		}
	case err != nil && !errors.Is(err, ErrCorrupt):
		m.t.Errorf("NewIdentity: %v, want ErrCorrupt", err)
	}
	return err
}
