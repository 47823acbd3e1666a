// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// gate judges the filesystem of dir by its type. If dir does not exist yet, that is
// the filesystem of its first ancestor that does. Errors are [ErrUnusable]. An xfs
// that passes may still lack reflink, or have blocks that are too large: see tryVolume.
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
	err = fmt.Errorf("%w: %s is on %s (f_type %#x)%s, which cannot share extents between files; expected btrfs (%#x) or xfs (%#x)",
		ErrUnusable, dir, st.Type.Name(), int64(st.Type), note, int64(fsctl.Btrfs), int64(fsctl.XFS))
	return health.Advise(err, "give --pool a directory on one of these, "+orLoopback)
}

// orLoopback is the way out for every filesystem that cannot be a pool itself.
const orLoopback = "or add --loopback-pool-size to make an xfs pool in a file there"

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

// tryVolume does in dir what every volume will need: it clones a file, and attaches the clone
// to a loop device. Whatever would make that fail is found out before anything is promised.
// Nothing in it has a name, so a crash leaves nothing behind.
//
// Errors that another filesystem would not have are [ErrUnusable]. A full filesystem is none:
// then the trial says nothing, and the volumes that are there have to be unpublished. It takes
// about 3 ms.
func tryVolume(dir string) error {
	if err := tryReflink(dir); err != nil {
		return err
	}
	return tryLoop(dir)
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
		return health.Advise(fmt.Errorf("%w: a trial clone in %s failed: %w", ErrUnusable, dir, err), "make the xfs with `mkfs.xfs -m reflink=1`, "+orLoopback)
	case errors.Is(Full(err), ErrFull):
		return nil // layOut tries again and logs that the pool is full
	case err != nil:
		return health.Advise(fmt.Errorf("a trial clone in %s failed: %w", dir, err), "look for errors of its disk in the kernel log")
	}
	return nil
}

// tryLoop is [tryAttach] for a pool that may be full: then the trial says nothing, and layOut, which tries to
// clone once more, logs that the pool is full.
func tryLoop(dir string) error {
	if err := tryAttach(dir); !errors.Is(err, ErrFull) {
		return err
	}
	return nil
}

const (
	// trialSize is the size of the trial volume. It takes a few blocks of it.
	trialSize = size.MiB
)

// tryAttach clones a file, attaches the clone, and writes a block through the device.
func tryAttach(dir string) error {
	volume, err := trialVolume(dir)
	if err != nil {
		return Full(err)
	}
	defer volume.Close()
	return judgeTrial(dir, volume, useTrial(volume))
}

// judgeTrial says what it means for a pool in dir that a trial volume could not be used.
func judgeTrial(dir string, volume *os.File, err error) error {
	if err == nil {
		return nil
	}
	st, statErr := fsctl.StatusOf(volume)
	switch {
	case statErr != nil:
		return errors.Join(err, statErr)
	case errors.Is(err, loopdev.ErrNotDirect):
		return health.Advise(fmt.Errorf("%w: %s is on %s with blocks of %s: a trial volume could not be attached: %w",
			ErrUnusable, dir, st.Type.Name(), size.Format(st.BlockSize), err), smallerBlocks(st.Type)+", "+orLoopback)
	case errors.Is(err, syscall.EIO):
		// The kernel has no other error for a device that could not be written to.
		if room, roomErr := roomAround(volume); roomErr == nil && room < noRoom {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
	}
	return Full(health.Advise(fmt.Errorf("a trial volume in %s could not be attached and written: %w", dir, err), loopAdvice))
}

// loopAdvice is for a loop device that fails for no reason of the pool's.
const loopAdvice = "look into the kernel log (dmesg); in a container, check that it is privileged, and that the node has loaded the module loop"

// smallerBlocks is the advice for a filesystem whose blocks are too large for direct I/O.
func smallerBlocks(t fsctl.Type) string {
	if t == fsctl.XFS {
		return fmt.Sprintf("make the xfs with `mkfs.xfs -b size=%d`", loopdev.BlockSize)
	}
	return fmt.Sprintf("make the filesystem with blocks of %d bytes", loopdev.BlockSize)
}

// trialVolume makes a file without a name that shares a block with another file: on an xfs,
// such files have rules of their own for direct I/O.
func trialVolume(dir string) (*os.File, error) {
	template, err := tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil, err
	}
	defer template.Close()
	volume, err := tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err = template.Write(trialBlock('t')); err == nil {
		err = template.Truncate(trialSize)
	}
	if err == nil {
		err = reflink.Clone(volume, template)
	}
	if err != nil {
		volume.Close()
		return nil, err
	}
	return volume, nil
}

// plainVolume is trialVolume without a shared block.
func plainVolume(dir string) (*os.File, error) {
	f, err := tmpfile.Create(dir, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(trialSize); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func trialBlock(content byte) []byte { return bytes.Repeat([]byte{content}, loopdev.BlockSize) }

// useTrial writes a block of a trial volume through a loop device, and reads the file.
func useTrial(volume *os.File) error {
	dev, err := new(loopdev.Allocator).Attach(volume, loopdev.Options{AutoClear: true, Name: "trial"})
	if err != nil {
		return err
	}
	want, got := trialBlock('v'), make([]byte, loopdev.BlockSize)
	_, err = dev.File().WriteAt(want, 0)
	if err == nil {
		err = dev.Sync()
	}
	if err == nil {
		_, err = volume.ReadAt(got, 0)
	}
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s has other data than was written to %s", volume.Name(), dev.Path())
	}
	return errors.Join(err, dev.Detach())
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
//
// A directory inherits the property "compression" of the one that it is made in, and cannot
// have both. An empty directory loses the property. That of one with images stays, since its
// files have it too.
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
			continue
		}
		flags, err := flagsOf(path)
		if err != nil {
			return err
		}
		nocow = flags&fsctl.NoCOW != 0
		if flags&fsctl.Compression != 0 {
			logs.Warn("Images are made with btrfs's property \"compression\", which makes them slower, and a thick volume's writes may need new space; "+
				"when the directory is empty, start the plugin again, and it clears the property", "directory", path)
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

func flagsOf(dir string) (int, error) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	return fsctl.Flags(d)
}

func makeNoCOW(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := fsctl.ClearFlags(d, fsctl.Compression); err != nil {
		return err
	}
	return fsctl.AddFlags(d, fsctl.NoCOW)
}
