// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

// fsID tells filesystems apart: btrfs subvolumes share the type, not the id.
type fsID struct {
	magic int64
	fsid  unix.Fsid
}

func statfs(path string) (fsID, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fsID{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return fsID{magic: int64(st.Type), fsid: st.Fsid}, nil
}

// names of some f_type values, statfs(2), for the message.
var magics = map[int64]string{
	unix.BTRFS_SUPER_MAGIC:     "btrfs",
	unix.XFS_SUPER_MAGIC:       "xfs",
	unix.EXT4_SUPER_MAGIC:      "ext4",
	unix.TMPFS_MAGIC:           "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	unix.NFS_SUPER_MAGIC:       "nfs",
}

// Gate judges the filesystem that dir is on, or will be on once it is made, by
// its type. Errors are [ErrUnusable]. An xfs may still lack reflink: Open tries.
func Gate(dir string) error {
	probed, err := existing(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	id, err := statfs(probed)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if id.magic == unix.BTRFS_SUPER_MAGIC || id.magic == unix.XFS_SUPER_MAGIC {
		return nil
	}
	var note string
	if probed != dir {
		note = fmt.Sprintf(" (judged by %s, as the directory does not exist yet)", probed)
	}
	name := magics[id.magic]
	if name == "" {
		name = "a filesystem"
	}
	return fmt.Errorf("%w: %s is on %s (f_type %#x)%s, which cannot share extents between files; expected btrfs (%#x) or xfs (%#x): "+
		"give --pool a directory on one of these, or add --loopback-pool-size to make an xfs pool in a file there",
		ErrUnusable, dir, name, id.magic, note, unix.BTRFS_SUPER_MAGIC, unix.XFS_SUPER_MAGIC)
}

// existing walks up to the first ancestor that exists. Symbolic links are
// followed; a dangling one counts as missing.
func existing(dir string) (string, error) {
	for {
		_, err := os.Stat(dir)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, os.ErrNotExist) || dir == filepath.Dir(dir) {
			return "", err
		}
		dir = filepath.Dir(dir)
	}
}

// tryReflink clones a block within dir: only that proves that an xfs was made
// with reflink. It is ErrUnusable if it was not; a full pool proves nothing.
func tryReflink(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	err = reflink.Try(d)
	switch {
	case errors.Is(err, reflink.ErrUnsupported):
		return fmt.Errorf("%w: a trial clone in %s failed: %w; make the xfs with `mkfs.xfs -m reflink=1`, "+
			"or add --loopback-pool-size to make an xfs pool in a file there", ErrUnusable, dir, err)
	case errors.Is(full(err), ErrFull):
		return nil // no answer; layOut says so
	case err != nil:
		return fmt.Errorf("a trial clone in %s failed: %w; look for errors of its disk in the kernel log", dir, err)
	}
	return nil
}

// tryClone clones a block from the directory of templates into the others that
// hold images: on btrfs they must agree on copy-on-write.
func (p *Pool) tryClone() error {
	src, err := p.NewTemplate()
	if err != nil {
		return err
	}
	defer src.Close()
	if _, err := src.Write(make([]byte, os.Getpagesize())); err != nil {
		return full(err)
	}
	for _, dir := range imageDirs[1:] {
		if err := p.tryCloneInto(dir, src); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pool) tryCloneInto(dir string, src *os.File) error {
	dst, err := p.newImage(dir)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := reflink.Clone(dst, src); err != nil {
		if marked := full(err); errors.Is(marked, ErrFull) {
			return marked
		}
		return fmt.Errorf("%w: a trial clone from %s to %s in %s failed: %w; on btrfs both must agree on chattr +C: "+
			"move their files away, run `chattr +C` on both, and start again", ErrUnusable, templatesDir, dir, p.root, err)
	}
	return nil
}

// setNoCOW makes the image directories agree on btrfs. The flag holds for files
// made afterwards only, which cannot share extents with those made before: it is
// set while all of them are empty, and a directory that came later follows those
// that have images.
func (p *Pool) setNoCOW() error {
	if p.id.magic != unix.BTRFS_SUPER_MAGIC {
		return nil
	}
	nocow := true
	var empty []string
	for _, dir := range imageDirs {
		names, err := p.names(dir)
		if err != nil {
			return err
		}
		path := filepath.Join(p.root, dir)
		if len(names) == 0 {
			empty = append(empty, path)
		} else if nocow, err = hasFlag(path, nocowFlag); err != nil {
			return err
		}
	}
	if !nocow {
		return nil
	}
	for _, path := range empty {
		if err := addFlag(path, nocowFlag); err != nil {
			return fmt.Errorf("chattr +C %s: %w", path, err)
		}
	}
	return nil
}

// nocowFlag is FS_NOCOW_FL of <linux/fs.h>.
const nocowFlag = 0x00800000

// hasFlag looks at an inode flag; FS_IOC_GETFLAGS in ioctl_iflags(2).
func hasFlag(path string, flag int) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	return flags&flag != 0, err
}

// addFlag sets an inode flag; FS_IOC_SETFLAGS in ioctl_iflags(2).
func addFlag(path string, flag int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return err
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|flag)
}
