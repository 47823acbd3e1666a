// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unpacker unpacks tar archives beneath an open directory, one above the other.
//
// A name is resolved beneath the root, and no symbolic link is followed on the way. An entry takes
// the place of what has its name. Only a directory stays with what is in it, and gets the new
// owner, mode and attributes. Archives above the first hide files of those below by whiteouts:
// see whiteouts.
//
// Holes stay holes: blocks of zeros are not written.
//
// Sources: tar(5), pax(1) in POSIX.1-2017, layer.md of the OCI image specification.
type unpacker struct {
	root      int // the root directory's descriptor, for reading
	content   Content
	above     bool // the archive is not the first one
	lostFound bool // it was there before the first entry

	parents, targets held
	times            map[string]time.Time // of directories: each entry in one changes its time
	buf              []byte

	entries int64 // unpacked so far
	bytes   int64 // written to files so far
}

// unpackBuffer is how much is read and written at once.
const unpackBuffer = 1 << 20

// newUnpacker returns an unpacker for an open directory, which is empty but for ext4's lost+found.
func newUnpacker(root int, c Content) *unpacker {
	kind, err := kindOf(root, lostFound)
	return &unpacker{
		root: root, content: c, lostFound: err == nil && kind == unix.S_IFDIR,
		times: map[string]time.Time{}, buf: make([]byte, unpackBuffer),
	}
}

// close closes what the unpacker has opened. The filesystem can be unmounted after that.
func (u *unpacker) close() {
	u.parents.release()
	u.targets.release()
}

// layer unpacks one archive.
func (u *unpacker) layer(r io.ReadSeeker) error {
	if u.above {
		if err := u.whiteouts(r); err != nil {
			return err
		}
		if _, err := r.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	err := each(r, u.entry)
	u.above = true
	return err
}

// finish does what has to wait until everything is unpacked: the root directory, ext4's own
// directory, and the times of directories.
func (u *unpacker) finish() error {
	has, err := ownedOf(u.root)
	if err != nil {
		return err
	}
	if err := give(u.root, u.content.root(has)); err != nil {
		return fmt.Errorf("the root directory: %w", err)
	}
	if u.lostFound && u.content.FSGroup != nil {
		if err := u.prepare(lostFound); err != nil {
			return fmt.Errorf("%s: %w", lostFound, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(u.times)) {
		if err := u.setTime(name); err != nil {
			return fmt.Errorf("the time of %.200q: %w", name, err)
		}
	}
	return nil
}

// prepare applies the content's fsGroup to a directory.
func (u *unpacker) prepare(dir string) error {
	fd, err := openDir(u.root, dir)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	has, err := ownedOf(fd)
	if err != nil {
		return err
	}
	return give(fd, u.content.prepared(has, unix.S_IFDIR))
}

// setTime sets a directory's time, if it is still there.
func (u *unpacker) setTime(name string) error {
	fd, err := openDir(u.root, name)
	if err != nil {
		if notThere(err) {
			return nil
		}
		return err
	}
	defer unix.Close(fd)
	return touch(fd, u.times[name])
}

// each calls do for the entries of an archive. An error names the entry.
func each(r io.Reader, do func(*tar.Header, io.Reader) error) error {
	tr := tar.NewReader(r)
	last := "its beginning"
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the archive cannot be read after %s: %w", last, err)
		}
		last = fmt.Sprintf("entry %.200q", h.Name)
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := do(h, tr); err != nil {
			return fmt.Errorf("%s: %w", last, err)
		}
	}
}

// The names of whiteouts in image layers.
const (
	whiteout = ".wh."         // hides the name that follows, and everything beneath it
	opaque   = ".wh..wh..opq" // hides what lower layers have in its directory
	aufs     = ".wh..wh."     // begins names of AUFS' own files, which mean nothing here
)

// whiteouts applies the whiteouts of an archive to what the archives below it have left. They are
// applied before the archive's own entries, wherever in it they are.
func (u *unpacker) whiteouts(r io.Reader) error {
	return each(r, func(h *tar.Header, _ io.Reader) error {
		name, err := clean(h.Name)
		if err != nil {
			return err
		}
		dir, base := split(name)
		hidden, is := strings.CutPrefix(base, whiteout)
		if !is || strings.HasPrefix(base, aufs) && base != opaque {
			return nil
		}
		at, err := u.existing(&u.parents, dir)
		if err != nil {
			if notThere(err) {
				return nil // there is nothing to hide
			}
			return err
		}
		if base == opaque {
			return u.empty(at, dir)
		}
		if hidden == "" || hidden == "." || hidden == ".." {
			return fmt.Errorf("a whiteout of %q hides no file", hidden)
		}
		return u.hide(at, strings.TrimPrefix(dir+"/"+hidden, "/"), hidden)
	})
}

// hide removes a name if it is there. Nothing hides ext4's own directory.
func (u *unpacker) hide(at int, name, base string) error {
	if name == lostFound && u.lostFound {
		return nil
	}
	err := u.remove(at, name, base)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// empty hides everything in a directory.
func (u *unpacker) empty(at int, dir string) error {
	names, err := os.ReadDir(beneath(at, ""))
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := u.hide(at, strings.TrimPrefix(dir+"/"+n.Name(), "/"), n.Name()); err != nil {
			return err
		}
	}
	return nil
}

// isWhiteout reports whether an entry only says something about other layers.
func isWhiteout(name string) bool {
	_, base := split(name)
	return strings.HasPrefix(base, whiteout) || strings.HasPrefix(name, aufs) || strings.Contains(name, "/"+aufs)
}

// entry unpacks one entry.
func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if u.above && isWhiteout(name) {
		return nil
	}
	if name == "" {
		return u.rootEntry(h)
	}
	dir, base := split(name)
	at, err := u.parent(dir)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.directory(at, name, base, h)
	case tar.TypeReg, tar.TypeGNUSparse:
		err = u.regular(at, name, base, h, r)
	case tar.TypeSymlink:
		err = u.symlink(at, name, base, h)
	case tar.TypeLink:
		err = u.link(at, name, base, h)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		err = errors.New("it is a device or a named pipe, and a content has neither")
	default:
		err = fmt.Errorf("it is of the unknown type %q", h.Typeflag)
	}
	if err == nil {
		u.entries++
	}
	return err
}

// rootEntry gives the root directory what its own entry says.
func (u *unpacker) rootEntry(h *tar.Header) error {
	if h.Typeflag != tar.TypeDir {
		return errors.New("it would replace the root directory")
	}
	u.times["."] = h.ModTime
	u.entries++
	return u.describe(u.root, h, unix.S_IFDIR)
}

// directory makes a directory, or finds it there.
func (u *unpacker) directory(at int, name, base string, h *tar.Header) error {
	err := unix.Mkdirat(at, base, 0o700)
	there := errors.Is(err, unix.EEXIST)
	if there {
		var kind uint32
		if kind, err = kindOf(at, base); err == nil && kind != unix.S_IFDIR {
			there = false
			if err = u.remove(at, name, base); err == nil {
				err = unix.Mkdirat(at, base, 0o700)
			}
		}
	}
	if err != nil {
		return os.NewSyscallError("mkdirat", err)
	}
	fd, err := openDir(at, base)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	u.times[name] = h.ModTime
	if there {
		if err := dropAttributes(fd); err != nil {
			return err
		}
	}
	return u.describe(fd, h, unix.S_IFDIR)
}

// inPlace makes a name. What has the name already is removed first.
func (u *unpacker) inPlace(at int, name, base string, make func() error) error {
	err := make()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := u.remove(at, name, base); err != nil {
		return err
	}
	return make()
}

// regular makes a regular file. Its content comes first: a write takes capabilities away.
func (u *unpacker) regular(at int, name, base string, h *tar.Header, r io.Reader) error {
	fd := -1
	err := u.inPlace(at, name, base, func() (err error) {
		const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
		fd, err = unix.Openat(at, base, flags, 0o600)
		return os.NewSyscallError("openat", err)
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := u.write(fd, r, h.Size); err != nil {
		return err
	}
	if err := u.describe(fd, h, unix.S_IFREG); err != nil {
		return err
	}
	return touch(fd, h.ModTime)
}

// write writes a file's content, of size bytes.
func (u *unpacker) write(fd int, r io.Reader, size int64) error {
	end := int64(0) // of what was written
	for at := int64(0); at < size; {
		b := u.buf[:min(int64(len(u.buf)), size-at)]
		if _, err := io.ReadFull(r, b); err != nil {
			return fmt.Errorf("its content cannot be read: %w", err)
		}
		for from, to := range data(b) {
			if err := writeAll(fd, b[from:to], at+int64(from)); err != nil {
				return err
			}
			end = at + int64(to)
			u.bytes += int64(to - from)
		}
		at += int64(len(b))
	}
	if end == size {
		return nil
	}
	return os.NewSyscallError("ftruncate", unix.Ftruncate(fd, size))
}

// holeBlock is the size of the blocks that are left out if they are all zeros: that of the
// blocks of all filesystems.
const holeBlock = 4096

var zeros [holeBlock]byte

// data yields the parts of b, in whole blocks, that are not zeros.
func data(b []byte) iter.Seq2[int, int] {
	return func(yield func(from, to int) bool) {
		from := -1
		for at := 0; at < len(b); at += holeBlock {
			block := b[at:min(at+holeBlock, len(b))]
			switch zero := bytes.Equal(block, zeros[:len(block)]); {
			case !zero && from < 0:
				from = at
			case zero && from >= 0:
				if !yield(from, at) {
					return
				}
				from = -1
			}
		}
		if from >= 0 {
			yield(from, len(b))
		}
	}
}

// writeAll is pwrite(2) until all of b is written.
func writeAll(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return os.NewSyscallError("pwrite", err)
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

// symlink makes a symbolic link. Its text is kept as it is.
func (u *unpacker) symlink(at int, name, base string, h *tar.Header) error {
	err := u.inPlace(at, name, base, func() error {
		return os.NewSyscallError("symlinkat", unix.Symlinkat(h.Linkname, at, base))
	})
	if err != nil {
		return err
	}
	o, err := u.owner(h, unix.S_IFLNK)
	if err != nil {
		return err
	}
	if err := unix.Fchownat(at, base, o.uid, o.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fchownat", err)
	}
	err = attributes(h, func(attr string, value []byte) error { return unix.Lsetxattr(beneath(at, base), attr, value, 0) })
	if err != nil {
		return err
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(at, base, stamps(h.ModTime), unix.AT_SYMLINK_NOFOLLOW))
}

// link makes another name of a file that was unpacked before.
func (u *unpacker) link(at int, name, base string, h *tar.Header) error {
	target, err := clean(h.Linkname)
	if err != nil {
		return fmt.Errorf("the target of the hard link, %.200q: %w", h.Linkname, err)
	}
	if target == name {
		return errors.New("it is a hard link to itself")
	}
	dir, from := split(target)
	fd, err := u.existing(&u.targets, dir)
	if err == nil {
		err = u.inPlace(at, name, base, func() error { return unix.Linkat(fd, from, at, base, 0) })
	}
	if err != nil {
		return fmt.Errorf("a hard link to %.200q: %w", h.Linkname, err)
	}
	return nil
}

// describe gives an open file the owner, the attributes and the mode of an entry. The order
// matters: a change of the owner takes away capabilities and set-id bits, and an ACL changes the mode.
func (u *unpacker) describe(fd int, h *tar.Header, kind uint32) error {
	o, err := u.owner(h, kind)
	if err != nil {
		return err
	}
	if err := unix.Fchown(fd, o.uid, o.gid); err != nil {
		return os.NewSyscallError("fchown", err)
	}
	if err := attributes(h, func(attr string, value []byte) error { return unix.Fsetxattr(fd, attr, value, 0) }); err != nil {
		return err
	}
	return os.NewSyscallError("fchmod", unix.Fchmod(fd, o.mode))
}

// give sets the owner and the mode of an open file.
func give(fd int, o owned) error {
	if err := unix.Fchown(fd, o.uid, o.gid); err != nil {
		return os.NewSyscallError("fchown", err)
	}
	return os.NewSyscallError("fchmod", unix.Fchmod(fd, o.mode))
}

// owner returns the owner and the mode that an entry's file gets.
func (u *unpacker) owner(h *tar.Header, kind uint32) (owned, error) {
	for _, id := range []int{h.Uid, h.Gid} {
		if id < 0 || int64(id) >= math.MaxUint32 { // the largest number means "unchanged": chown(2)
			return owned{}, fmt.Errorf("its owner %d:%d is out of range", h.Uid, h.Gid)
		}
	}
	return u.content.prepared(owned{h.Uid, h.Gid, uint32(h.Mode & 0o7777)}, kind), nil
}

// paxAttr begins the keys of extended attributes in PAX records, as star, GNU tar, bsdtar and
// image builders write them.
const paxAttr = "SCHILY.xattr."

// attributes sets the extended attributes of an entry.
func attributes(h *tar.Header, set func(attr string, value []byte) error) error {
	for key, value := range h.PAXRecords {
		attr, is := strings.CutPrefix(key, paxAttr)
		if !is {
			continue
		}
		if err := set(attr, []byte(value)); err != nil {
			return fmt.Errorf("its attribute %.200q: %w", attr, err)
		}
	}
	return nil
}

// dropAttributes removes all extended attributes of an open file.
func dropAttributes(fd int) error {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX in linux/limits.h
	n, err := unix.Flistxattr(fd, list)
	if err != nil {
		return os.NewSyscallError("flistxattr", err)
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if attr == "" {
			continue
		}
		// An xfs lists each ACL twice, and both go together.
		if err := unix.Fremovexattr(fd, attr); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("removing its attribute %.200q: %w", attr, err)
		}
	}
	return nil
}

// openDir opens a directory for reading, beneath an open one.
func openDir(at int, name string) (int, error) {
	return unix.Openat2(at, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
}

// stamps are both times of a file: an archive rarely has that of the last access.
func stamps(t time.Time) []unix.Timespec {
	at := unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	return []unix.Timespec{at, at}
}

// touch sets the times of an open file.
func touch(fd int, t time.Time) error {
	ts := stamps(t)
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts[0])), 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("utimensat", errno)
	}
	return nil
}
