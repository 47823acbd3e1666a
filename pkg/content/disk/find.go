// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	// place is the directory of a containerDisk that has the disk.
	place = "/disk"
	// maxFiles bounds what is there besides, in layers below too. It is taken out before it is known which one it is.
	maxFiles = 8
	// maxTail is what may follow the end of a tar archive, in bytes: tar(1) fills up its last record.
	maxTail = 16 * size.MiB

	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// entry is what layers have at a path below [place].
type entry struct {
	file *os.File // nil if it is not a regular file
}

func (e *entry) close() {
	if e != nil && e.file != nil {
		e.file.Close()
	}
}

// search is the state of the directory, after some layers.
type search struct {
	dir  string
	left int64 // bytes that may still be read
	room int64 // bytes that files may still have, holes included: a tar archive can say of a few bytes that they are many
	at   map[string]*entry
}

// Find takes the disk out of a containerDisk: the only regular file below /disk, as the layers show it one above the
// other. The layers are tar archives that are not compressed, bottom first, and are read to their ends; together
// they may have most bytes. It returns an unnamed file in dir, a directory of the pool, with holes for
// zeros, and the file's path in the image.
//
// Errors are [ErrUnusable], which lists what is there, [pool.ErrFull], those of the layers, and the cause of ctx.
func Find(ctx context.Context, dir string, most int64, layers ...io.Reader) (f *os.File, name string, err error) {
	s := &search{dir: dir, left: most, room: most, at: map[string]*entry{}}
	defer func() {
		for _, e := range s.at {
			if e.file != f {
				e.close()
			}
		}
	}()
	for i, layer := range layers {
		if err := s.layer(ctx, layer); err != nil {
			return nil, "", fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return s.only()
}

// only returns the file, if there is one.
func (s *search) only() (*os.File, string, error) {
	names := slices.Sorted(maps.Keys(s.at))
	switch {
	case len(names) == 0:
		return nil, "", unusable("the image has no file in /disk; make it as KubeVirt's containerDisks are made")
	case len(names) > 1:
		return nil, "", unusable("the image has several files in /disk, and must have one: %.500q", strings.Join(names, ", "))
	case s.at[names[0]].file == nil:
		return nil, "", unusable("%.200q in the image is not a regular file", names[0])
	}
	return s.at[names[0]].file, names[0], nil
}

// change is what one layer does to the layers below it, wherever in the layer it says so.
type change struct {
	gone   []string // paths that go, with all below them
	hidden []string // directories whose content goes
	added  map[string]*entry
}

func (s *search) layer(ctx context.Context, r io.Reader) error {
	c := &change{added: map[string]*entry{}}
	limited := &io.LimitedReader{R: r, N: s.left + 1}
	err := s.read(ctx, tar.NewReader(limited), c)
	if err == nil {
		err = drain(limited)
	}
	s.left = limited.N - 1
	s.apply(c)
	if limited.N <= 0 {
		return unusable("its layers have more bytes than they may have")
	}
	return err
}

// drain reads what follows an archive, so that who verifies the layer sees its end.
func drain(r io.Reader) error {
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxTail+1))
	if err == nil && n > maxTail {
		return unusable("more than %s follow the end of its tar archive", size.Format(maxTail))
	}
	return err
}

func (s *search) read(ctx context.Context, t *tar.Reader, c *change) error {
	for {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		h, err := t.Next()
		switch {
		case err == io.EOF:
			return nil
		case errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF):
			return unusable("its tar archive is damaged or truncated")
		case err != nil:
			return err
		}
		if err := s.entry(ctx, t, h, c); err != nil {
			return err
		}
	}
}

// entry notes what an entry of a layer does, and takes its file out if it may be the disk.
func (s *search) entry(ctx context.Context, t *tar.Reader, h *tar.Header, c *change) error {
	name := path.Clean("/" + h.Name)
	dir, base := path.Split(name)
	hides, isWhiteout := strings.CutPrefix(base, whiteout)
	switch {
	case base == opaque:
		c.hidden = append(c.hidden, path.Clean(dir))
	case isWhiteout:
		c.gone = append(c.gone, path.Join(dir, hides))
	case h.Typeflag == tar.TypeDir:
		// A directory shows what is below it in lower layers, and takes the place of a file.
		c.added[name].close()
		delete(c.added, name)
		if e := s.at[name]; e != nil {
			c.gone = append(c.gone, name)
		}
	case name == place || strings.HasPrefix(place, name+"/"):
		c.gone = append(c.gone, name)
	case strings.HasPrefix(name, place+"/"):
		return s.take(ctx, t, h, name, c)
	}
	return nil
}

func (s *search) take(ctx context.Context, t *tar.Reader, h *tar.Header, name string, c *change) error {
	c.added[name].close()
	delete(c.added, name)
	if len(s.at)+len(c.added) >= maxFiles {
		names := slices.Sorted(maps.Keys(c.added))
		return unusable("the image has many files in /disk, and must have one: %.500q", strings.Join(names, ", "))
	}
	e := &entry{}
	if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeGNUSparse {
		if s.room -= h.Size; s.room < 0 {
			return unusable("%.200q in the image has more bytes than it may have", name)
		}
		var err error
		if e.file, err = Copy(ctx, s.dir, t); errors.Is(err, io.ErrUnexpectedEOF) {
			return unusable("%.200q in the image is truncated", name)
		} else if err != nil {
			return err
		}
	}
	c.added[name] = e
	return nil
}

// apply puts a layer on those below it.
func (s *search) apply(c *change) {
	for name, e := range s.at {
		if slices.ContainsFunc(c.gone, func(gone string) bool { return name == gone || below(name, gone) }) ||
			slices.ContainsFunc(c.hidden, func(dir string) bool { return below(name, dir) }) {
			e.close()
			delete(s.at, name)
		}
	}
	for name, e := range c.added {
		for lower, old := range s.at { // a file takes the place of a directory too
			if lower == name || below(lower, name) {
				old.close()
				delete(s.at, lower)
			}
		}
		s.at[name] = e
	}
}

func below(name, dir string) bool { return strings.HasPrefix(name, strings.TrimSuffix(dir, "/")+"/") }

func create(dir string) (*os.File, error) {
	f, err := tmpfile.Create(dir, 0o600)
	return f, pool.Full(err)
}
