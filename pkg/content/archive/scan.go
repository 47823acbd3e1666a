// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	headerSize = 512
	maxName    = 255     // NAME_MAX, limits.h(0p): bytes of a component
	maxPath    = 4095    // PATH_MAX without the NUL, in bytes
	maxXattr   = 1 << 16 // XATTR_SIZE_MAX, linux/limits.h: bytes of a value
	// maxDepth is how many components a path may have. The deepest trees that people make are those of
	// node_modules, of some 40.
	maxDepth = 256
	// maxFile is the largest file of an ext4 with blocks of 4 KiB, in bytes. Only a sparse one can reach it.
	maxFile = 16<<40 - blockSize
)

// What archives say beside the name and type of a member.
const (
	xattrRecord  = "SCHILY.xattr." // pax record of an extended attribute
	sparseRecord = "GNU.sparse."
	whiteout     = ".wh."
	opaque       = ".wh..wh..opq" // a directory is emptied of what lower layers have
)

// scanner reads the headers of archives.
type scanner struct {
	Summary
	most int64               // entries
	dirs map[uint64]struct{} // hashes of the paths of all directories
	seed maphash.Seed
}

// archive reads one archive to its end.
func (s *scanner) archive(t *tee) error {
	if s.seed == (maphash.Seed{}) {
		s.seed = maphash.MakeSeed()
	}
	var last member
	for r := tar.NewReader(t); ; {
		h, err := r.Next()
		if errors.Is(err, tar.ErrInsecurePath) { // with GODEBUG=tarinsecurepath=0
			err = nil
		}
		switch {
		// The reader takes the end of the data for the end of the archive.
		case err == io.EOF && !t.zero:
			return fmt.Errorf("%w: the blocks of zeros at its end are missing: it was cut off after %s; copy it again",
				ErrDamaged, size.Format(t.n))
		case err != nil && err != io.EOF:
			return err
		}
		s.skipped(last, t)
		if err == io.EOF {
			return nil
		}
		if err := s.entry(h, r); err != nil {
			return err
		}
		last = member{h, t.n}
		t.zero = false // the end of a file may look like that of the archive
	}
}

// member is the one whose header was read last, and how much of the archive was read with it and its content.
type member struct {
	*tar.Header
	read int64
}

// skipped counts a sparse file, after the next header was read. The reader would write out its holes if it were asked
// for the content, and has skipped what is stored. That is counted together with the extended header that may follow.
func (s *scanner) skipped(last member, t *tee) {
	if last.Header != nil && isSparse(last.Header) {
		s.content(last.Size, min(last.Size, max(0, t.n-last.read-headerSize)))
	}
}

// entry takes in one member, and reads the content of a file.
func (s *scanner) entry(h *tar.Header, r *tar.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader { // a comment, as git-archive(1) writes it
		return nil
	}
	path, err := s.check(h)
	if err != nil {
		return fmt.Errorf("%w: entry %.256q %w", ErrRefused, h.Name, err)
	}
	s.Entries++
	s.parents(path)
	switch h.Typeflag {
	case tar.TypeDir:
		s.directory(strings.Join(path, "/"))
	case tar.TypeSymlink:
		s.symlink(h.Linkname)
	case tar.TypeLink:
		s.links++
	default:
		if err := s.file(h, r); err != nil {
			return err
		}
	}
	s.named(path, h)
	if s.Entries+s.implicit > s.most {
		return fmt.Errorf("%w: it has more than %d entries", ErrLimit, s.most)
	}
	return nil
}

// check refuses what no volume may get from an archive. It returns the components of the path.
func (s *scanner) check(h *tar.Header) ([]string, error) {
	path, err := components(h.Name)
	if err != nil {
		return nil, err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		err = checkFile(path, h)
	case tar.TypeDir:
	case tar.TypeSymlink:
		err = checkSymlink(path, h.Linkname)
	case tar.TypeLink:
		err = checkLink(path, h.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		err = errors.New("is a device; leave it out")
	case tar.TypeFifo:
		err = errors.New("is a FIFO; leave it out")
	default:
		err = fmt.Errorf("has the unknown type %q", string(h.Typeflag))
	}
	if err == nil {
		err = checkAttributes(h)
	}
	return path, err
}

// components splits a path. "." and empty components mean nothing, so that the root has none.
func components(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, fmt.Errorf("has a path of %d bytes, Linux allows %d", len(name), maxPath)
	}
	var path []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return nil, errors.New(`has ".." in its path; make the archive with paths below one directory`)
		case len(part) > maxName:
			return nil, fmt.Errorf("has a name of %d bytes, Linux allows %d", len(part), maxName)
		case len(path) == maxDepth:
			return nil, fmt.Errorf("is more than %d directories deep", maxDepth)
		}
		path = append(path, part)
	}
	return path, nil
}

func checkFile(path []string, h *tar.Header) error {
	if len(path) == 0 {
		return errors.New("is the root, and not a directory")
	}
	name := path[len(path)-1]
	hidden, isWhiteout := strings.CutPrefix(name, whiteout)
	switch {
	case isWhiteout && (hidden == "" || hidden == "." || hidden == ".."):
		return errors.New("removes no name")
	case h.Size < 0 || h.Size > maxFile:
		return fmt.Errorf("has %s, a file has at most %s", size.Format(h.Size), size.Format(maxFile))
	}
	return nil
}

func checkSymlink(path []string, target string) error {
	switch {
	case len(path) == 0:
		return errors.New("is the root, and not a directory")
	case target == "" || len(target) > maxPath:
		return fmt.Errorf("is a symbolic link to %d bytes, Linux allows 1 to %d", len(target), maxPath)
	}
	return nil
}

func checkLink(path []string, target string) error {
	if len(path) == 0 {
		return errors.New("is the root, and not a directory")
	}
	to, err := components(target)
	if err == nil && len(to) == 0 {
		err = errors.New("is the root, and not a file")
	}
	if err != nil {
		return fmt.Errorf("is a hard link, whose target %.256q %w", target, err)
	}
	return nil
}

func checkAttributes(h *tar.Header) error {
	for _, id := range []int{h.Uid, h.Gid} {
		// The largest 32-bit number means "no change" to chown(2).
		if id < 0 || id >= math.MaxUint32 {
			return fmt.Errorf("belongs to %d:%d, ids are from 0 to %d", h.Uid, h.Gid, math.MaxUint32-1)
		}
	}
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if ok && (len(name) > maxName || len(value) > maxXattr) {
			return fmt.Errorf("has the extended attribute %.64q of %s; Linux allows a name of %d bytes and a value of %s",
				name, size.Format(int64(len(value))), maxName, size.Format(maxXattr))
		}
	}
	return nil
}

// parents counts the directories above a member that have no entry of their own yet.
func (s *scanner) parents(path []string) {
	for end := len(path) - 1; end > 0; end-- {
		if !s.isNew(strings.Join(path[:end], "/")) {
			return
		}
		s.implicit++
		s.directories++
		s.names += nameSpace(path[end-1])
	}
}

// directory counts a directory that was not seen yet.
func (s *scanner) directory(path string) {
	if s.isNew(path) {
		s.directories++
	}
}

// isNew notes the path of a directory, and reports whether it was not noted yet. Two paths with one hash
// are one in 10 million archives of the largest number of directories.
func (s *scanner) isNew(path string) bool {
	hash := maphash.String(s.seed, path)
	if _, ok := s.dirs[hash]; ok {
		return false
	}
	s.dirs[hash] = struct{}{}
	return true
}

// file counts a file and reads its content. A sparse one is counted by [scanner.skipped].
func (s *scanner) file(h *tar.Header, r *tar.Reader) error {
	if isSparse(h) {
		return nil
	}
	s.content(h.Size, h.Size)
	_, err := io.Copy(io.Discard, r)
	return err
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, sparseRecord) {
			return true
		}
	}
	return false
}
