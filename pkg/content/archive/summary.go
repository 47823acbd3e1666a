// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Summary is what archives have in them, all counted together. [Summary.Needs] says how large a filesystem
// must be for it.
type Summary struct {
	Entries int64 // members, whiteouts among them
	Bytes   int64 // of the content of files, without holes

	files       int64
	directories int64 // the root is not among them
	implicit    int64 // those of the directories that have no entry, and are only parts of paths
	links       int64 // further names of files
	symlinks    int64
	longLinks   int64 // symbolic links of 60 bytes or more, which have a block of their own on ext4

	blocks int64 // bytes of the blocks that the content of files takes
	small  int64 // bytes of the blocks of files that btrfs keeps in its metadata
	inline int64 // bytes of the content of these
	names  int64 // bytes of the names in directories, with what each of them takes beside its letters
	attrs  int64 // bytes of extended attributes
	carry  int64 // members that have some
}

const (
	// maxInline is the largest file that btrfs keeps in its metadata, in bytes: max_inline in btrfs(5).
	maxInline = 2048
	// longLink is from how many bytes on an ext4 keeps a symbolic link in a block:
	// EXT4_N_BLOCKS in fs/ext4/ext4.h.
	longLink = 60
	// nameExtra is what a name takes in a directory beside its letters, in bytes: inode number, length
	// and type, rounding, and the hash by which it is found.
	nameExtra = 24
)

func nameSpace(name string) int64 { return int64(len(name)) + nameExtra }

// content counts a file of so many bytes, of which some are stored. What is stored of a sparse file need not begin
// and end with a block.
func (s *Summary) content(length, stored int64) {
	s.files++
	s.Bytes += stored
	blocks := roundUp(length)
	if stored < length {
		blocks = min(blocks, roundUp(2*stored))
	}
	s.blocks += blocks
	if length <= maxInline {
		s.small += blocks
		s.inline += stored
	}
}

func (s *Summary) symlink(target string) {
	s.symlinks++
	s.inline += int64(len(target))
	if len(target) >= longLink {
		s.longLinks++
	}
}

// named counts what each member takes beside its content: its name, and its extended attributes.
func (s *Summary) named(path []string, h *tar.Header) {
	if len(path) > 0 {
		s.names += nameSpace(path[len(path)-1])
	}
	var attrs int64
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, xattrRecord); ok {
			attrs += nameSpace(name) + int64(len(value))
		}
	}
	s.attrs += attrs
	if attrs > 0 {
		s.carry++
	}
}

// inodes is how many inodes a filesystem needs, without those that it has for itself.
func (s *Summary) inodes() int64 { return s.files + s.directories + s.symlinks }

// Needs returns the least size, in bytes and a whole number of MiB, of a filesystem that holds the content,
// not less than from. That is from itself, rounded up, if such a filesystem holds it. options are the format
// options of pkg/diskfs, which for instance decide how many inodes an ext4 has.
//
// It is asked with the size that somebody wants, since a larger ext4 may hold less: below 512 MiB it has an
// inode for each 4 KiB, from there on one for each 16 KiB ("inode_ratio" in mke2fs.conf(5)).
//
// The size is an estimate from above. A filesystem of a third of it is too small, unless that is less than
// the filesystem's own least size.
func (s Summary) Needs(filesystem string, options map[string]string, from int64) int64 {
	needs, ok := filesystems[filesystem]
	if !ok {
		needs = func(*Summary, map[string]string, int64) int64 { return 0 }
	}
	// What a filesystem takes for itself never becomes less with its size. So this ends at the least size.
	for size := wholeMiB(max(from, 1)); ; {
		need := wholeMiB(needs(&s, options, size))
		if need <= size {
			return size
		}
		size = need
	}
}

func wholeMiB(n int64) int64 { return (n + size.MiB - 1) / size.MiB * size.MiB }
