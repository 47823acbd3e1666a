// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

// gate judges the filesystem of dir by its type. If dir does not exist yet, that is
// the filesystem of its first ancestor that does. Errors are [ErrUnusable]. An xfs
// that passes may still lack reflink: see tryReflink.
func gate(dir string) error {
	probed, err := existing(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	st, err := fsctl.StatusAt(probed)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	if st.Type == fsctl.Btrfs || st.Type == fsctl.XFS {
		return nil
	}
	var note string
	if probed != dir {
		note = fmt.Sprintf(" (judged by %s, as the directory does not exist yet)", probed)
	}
	return fmt.Errorf("%w: %s is on %s (f_type %#x)%s, which cannot share extents between files; expected btrfs (%#x) or xfs (%#x): "+
		"give --pool a directory on one of these, or add --loopback-pool-size to make an xfs pool in a file there",
		ErrUnusable, dir, st.Type.Name(), int64(st.Type), note, int64(fsctl.Btrfs), int64(fsctl.XFS))
}

// existing returns dir or its first ancestor that exists. Symbolic links are
// followed. A dangling link counts as missing.
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

// tryReflink clones a block within dir: nothing else tells whether an xfs was made
// with reflink. It returns [ErrUnusable] if the clone is not supported, and nil if the
// pool is full, since then the trial says nothing.
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
	case errors.Is(Full(err), ErrFull):
		return nil // layOut tries again and logs that the pool is full
	case err != nil:
		return fmt.Errorf("a trial clone in %s failed: %w; look for errors of its disk in the kernel log", dir, err)
	}
	return nil
}

// tryClone clones a block from the directory of templates into the other image
// directories: on btrfs they must agree on copy-on-write.
func (p *Pool) tryClone() error {
	src, err := p.NewTemplate()
	if err != nil {
		return err
	}
	defer src.Close()
	if _, err := src.Write(make([]byte, os.Getpagesize())); err != nil {
		return Full(err)
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
		if marked := Full(err); errors.Is(marked, ErrFull) {
			return marked
		}
		return fmt.Errorf("%w: a trial clone from %s to %s in %s failed: %w; on btrfs both must agree on chattr +C: "+
			"move their files away, run `chattr +C` on both, and start again", ErrUnusable, templatesDir, dir, p.root, err)
	}
	return nil
}

// setNoCOW makes the image directories agree on the NOCOW flag, on btrfs. The flag
// holds only for files that are made afterwards, and these cannot share extents with
// older files. So it is set while all directories are empty. A directory that was
// added later gets the flag if those with images have it.
func (p *Pool) setNoCOW() error {
	if p.id.Type != fsctl.Btrfs {
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
		} else if nocow, err = isNoCOW(path); err != nil {
			return err
		}
	}
	if !nocow {
		return nil
	}
	for _, path := range empty {
		if err := makeNoCOW(path); err != nil {
			return fmt.Errorf("chattr +C %s: %w", path, err)
		}
	}
	return nil
}

func isNoCOW(dir string) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer d.Close()
	flags, err := fsctl.Flags(d)
	return flags&fsctl.NoCOW != 0, err
}

func makeNoCOW(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return fsctl.AddFlags(d, fsctl.NoCOW)
}
