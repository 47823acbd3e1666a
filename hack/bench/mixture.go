// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// mixture describes an archive as builds have them: many small files, as modules and caches are, and a few large ones.
type mixture struct {
	bytes int64 // of all files
	small int   // files of smallLeast to smallMost bytes
}

const (
	smallLeast, smallMost = 4 << 10, 64 << 10
	largeLeast, largeMost = 1 << 20, 64 << 20

	perDirectory = 100 // files
)

// sizes are those of the files, in the order in which they are in the archive.
func (m mixture) sizes(r *rand.Rand) (sizes []int64) {
	left := m.bytes
	for range m.small {
		sizes = append(sizes, smallLeast+r.Int64N(smallMost-smallLeast))
		left -= sizes[len(sizes)-1]
	}
	for left > 0 {
		size := min(left, largeLeast+r.Int64N(min(largeMost, m.bytes/8)))
		sizes = append(sizes, size)
		left -= size
	}
	r.Shuffle(len(sizes), func(i, j int) { sizes[i], sizes[j] = sizes[j], sizes[i] })
	return sizes
}

// each calls its functions for all directories and files, in the order in which they are in the archive. The same seed
// makes the same bytes, which cannot be compressed.
func (m mixture) each(seed uint64, directory func(name string) error,
	file func(name string, size int64, from io.Reader) error) error {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	noise := rand.NewChaCha8(key)
	for i, size := range m.sizes(rand.New(noise)) {
		in := fmt.Sprintf("d%03d/", i/perDirectory)
		if i%perDirectory == 0 {
			if err := directory(in); err != nil {
				return err
			}
		}
		if err := file(fmt.Sprintf("%sf%05d", in, i), size, noise); err != nil {
			return err
		}
	}
	return nil
}

// write writes the archive.
func (m mixture) write(path string, seed uint64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buffer := bufio.NewWriterSize(f, 1<<20)
	w := tar.NewWriter(buffer)
	err = m.each(seed, func(name string) error {
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: time.Unix(1e9, 0)})
	}, func(name string, size int64, from io.Reader) error { return writeFile(w, name, size, from) })
	if err != nil {
		return err
	}
	return errors.Join(w.Close(), buffer.Flush(), f.Sync())
}

// fill writes the files into a directory.
func (m mixture) fill(dir string, seed uint64) error {
	return m.each(seed, func(name string) error {
		return os.Mkdir(filepath.Join(dir, name), 0o755)
	}, func(name string, size int64, from io.Reader) error {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, from, size)
		return errors.Join(err, f.Close())
	})
}

// rewrittenPiece is how much is written in one place, in bytes.
const rewrittenPiece = 64 << 10

// rewrite writes a tenth of what fill wrote into a directory again: pieces at random places of its larger files. Other
// images share none of these blocks after that.
func (m mixture) rewrite(dir string, seed uint64) error {
	files, err := filesFrom(dir, largeLeast)
	if err != nil {
		return err
	}
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	r := rand.New(noise)
	piece := make([]byte, rewrittenPiece)
	for range m.changed() / rewrittenPiece {
		noise.Read(piece)
		if err := writeIn(files[r.IntN(len(files))], piece, r); err != nil {
			return err
		}
	}
	return nil
}

// filesFrom lists the files below a directory that have a size or more.
func filesFrom(dir string, size int64) (files []string, err error) {
	err = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		fi, err := e.Info()
		if err == nil && fi.Size() >= size {
			files = append(files, path)
		}
		return err
	})
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("%s has no file of %s", dir, amount(size))
	}
	return files, err
}

// writeIn writes a piece somewhere into a file, which keeps its size. Blocks of filesystems have 4 KiB.
func writeIn(path string, piece []byte, r *rand.Rand) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err == nil {
		_, err = f.WriteAt(piece, r.Int64N(fi.Size()-int64(len(piece))+1)&^4095)
	}
	return errors.Join(err, f.Close())
}

// writeFile adds a file to an archive.
func writeFile(w *tar.Writer, name string, size int64, from io.Reader) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(1e9, 0)}
	err := w.WriteHeader(h)
	if err == nil {
		_, err = io.CopyN(w, from, size)
	}
	return err
}

// archiveDir writes an archive of a directory, with the owners of its files.
func archiveDir(path, dir string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Sync())
}
