// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"strconv"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// filesystems says for each filesystem of pkg/diskfs how many bytes an image must have for a content, if it
// is formatted as an image of size bytes.
var filesystems = map[string]func(s *Summary, options map[string]string, size int64) int64{
	"ext4":  (*Summary).ext4,
	"xfs":   (*Summary).xfs,
	"btrfs": (*Summary).btrfs,
}

// group is the size of an ext4's block group with blocks of 4 KiB, in bytes.
const group = 128 * size.MiB

// ext4 follows mke2fs(8), with the options that pkg/diskfs gives it.
func (s *Summary) ext4(options map[string]string, bytes int64) int64 {
	ratio := number(options, "bytes-per-inode", inodeRatio(bytes))
	const own = 11 // inodes that are reserved, and lost+found
	inodes := max((s.inodes()+own)*ratio, bytes)
	groups := bytes/group + 1
	needs := s.blocks + (s.directories+s.longLinks+s.carry)*blockSize + 2*s.names
	needs += needs / 200                                          // extents that do not fit into an inode
	needs += inodes / ratio * number(options, "inode-size", 256)  // tables
	needs += groups * 3 * blockSize                               // bitmaps, and superblocks
	needs += superblocks(groups) * min(bytes/2048, 4*size.MiB)    // descriptors, for growth by 1024 too
	needs += min(bytes/50, 16*size.MiB)                           // s_resv_clusters: fs/ext4/super.c
	needs += bytes / 100 * number(options, "reserved-percent", 0) // for root
	if options["journal"] != "off" {
		needs += journal(bytes)
	}
	return max(needs, (s.inodes()+own)*ratio)
}

// inodeRatio is how many bytes there are for each inode: "inode_ratio" in mke2fs.conf(5) for the types small,
// default, big and huge.
func inodeRatio(bytes int64) int64 {
	switch {
	case bytes < 512*size.MiB:
		return 4096
	case bytes < 4<<40:
		return 16384
	case bytes < 16<<40:
		return 32768
	}
	return 65536
}

// journal is the size of an ext4's journal, in bytes: ext2fs_default_journal_size in lib/ext2fs/mkjournal.c.
func journal(bytes int64) int64 {
	switch blocks := bytes / blockSize; {
	case blocks < 32<<10:
		return 4 * size.MiB
	case blocks < 256<<10:
		return 16 * size.MiB
	case blocks < 512<<10:
		return 32 * size.MiB
	case blocks < 4096<<10:
		return 64 * size.MiB
	case blocks < 8192<<10:
		return 128 * size.MiB
	case blocks < 16384<<10:
		return 256 * size.MiB
	case blocks < 32768<<10:
		return 512 * size.MiB
	}
	return size.GiB
}

// superblocks is how many groups of an ext4 have a superblock: the first two, and the powers of 3, 5 and 7.
func superblocks(groups int64) int64 {
	n := min(groups, 2)
	for _, base := range []int64{3, 5, 7} {
		for power := base; power < groups; power *= base {
			n++
		}
	}
	return n
}

// xfs follows mkfs.xfs(8).
func (s *Summary) xfs(options map[string]string, bytes int64) int64 {
	inodes := s.inodes() * number(options, "inode-size", 512)
	needs := s.blocks + (s.directories+s.carry)*blockSize + s.attrs + 2*s.names + inodes + inodes/8
	needs += needs / 200
	needs += max(64*size.MiB, min(bytes/2048, 2*size.GiB)) // log
	needs += min(bytes/20, 32*size.MiB)                    // xfs_default_resblks in fs/xfs/xfs_fsops.c
	needs += bytes / 50                                    // for the trees of extents: fs/xfs/libxfs/xfs_ag_resv.c
	const share = 4                                        // imaxpct: inodes take a quarter
	return max(needs, share*inodes)
}

// What one file, or one name, takes in the trees of a btrfs, in bytes: inode, reference, two entries of a
// directory, with the header of each (include/uapi/linux/btrfs_tree.h). And what an extent takes: where it
// is, who has it, and the sums of its blocks.
const (
	btrfsInode  = 25 + 160
	btrfsName   = 25 + 10 + 2*(25+30)
	btrfsExtent = 25 + 53 + 25 + 53
	btrfsSums   = 1024 // bytes of data for each byte of sums, and their headers
)

// btrfs follows mkfs.btrfs(8), and the allocation of chunks in fs/btrfs/volumes.c.
func (s *Summary) btrfs(options map[string]string, bytes int64) int64 {
	copies := int64(1)
	if options["metadata-profile"] == "dup" {
		copies = 2
	}
	data := s.blocks - s.small
	names := s.files + s.directories + s.symlinks + s.links
	trees := s.inodes()*btrfsInode + names*btrfsName + 3*s.names + s.files*(btrfsExtent+25) +
		s.inline + s.attrs + s.carry*30 + data/btrfsSums*2
	trees *= 2                                                  // a leaf may be half empty
	trees += trees/4 + 8*size.MiB                               // what is kept back for deleting
	chunk := min(bytes/10, 256*size.MiB)                        // a chunk of metadata that is just begun
	return data + data/100 + copies*(trees+chunk) + 32*size.MiB // and the chunk of the system
}

// number is the value of a format option.
func number(options map[string]string, key string, otherwise int64) int64 {
	if n, err := strconv.ParseInt(options[key], 10, 64); err == nil {
		return n
	}
	return otherwise
}
