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

// write writes the archive. The same seed makes the same bytes, which cannot be compressed.
func (m mixture) write(path string, seed uint64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	noise := rand.NewChaCha8(key)
	buffer := bufio.NewWriterSize(f, 1<<20)
	w := tar.NewWriter(buffer)
	for i, size := range m.sizes(rand.New(noise)) {
		directory := fmt.Sprintf("d%03d/", i/perDirectory)
		if i%perDirectory == 0 {
			err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: directory, Mode: 0o755, ModTime: time.Unix(1e9, 0)})
		}
		if err == nil {
			err = writeFile(w, fmt.Sprintf("%sf%05d", directory, i), size, noise)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), buffer.Flush(), f.Sync())
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
