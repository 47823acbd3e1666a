// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Blobs is a directory of the pool with one read-only file for each blob: sha256-HEX. A file that is there
// is whole, and was verified. Its modification time is when it was last used.
//
// One process trims it: the plugin. Others may pull beside it, as `template build` does. A blob that is trimmed
// under such a one is pulled again by its next try.
type Blobs struct {
	dir string

	mu   sync.Mutex
	held map[string]*blob // by digest: in use, or with a part that has arrived
}

// blob is one that somebody uses or downloads.
type blob struct {
	users   int           // guarded by Blobs.mu
	turn    chan struct{} // has one element while somebody looks at the blob or downloads it
	partial *partial      // belongs to who has the turn
}

// OpenBlobs makes the directory if it does not exist.
func OpenBlobs(dir string) (*Blobs, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, pool.Full(err)
	}
	return &Blobs{dir: dir, held: map[string]*blob{}}, nil
}

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// blobName returns the name of a blob's file.
func blobName(digest string) (string, error) {
	if !digestForm.MatchString(digest) {
		return "", fmt.Errorf("%w: %.80q is no digest that can be checked: it must be sha256 with 64 hexadecimal digits",
			ErrInvalid, digest)
	}
	return strings.Replace(digest, ":", "-", 1), nil
}

// digestIn undoes [blobName].
func digestIn(name string) (digest string, ok bool) {
	digest = strings.Replace(name, "-", ":", 1)
	return digest, digestForm.MatchString(digest)
}

func (b *Blobs) path(digest string) string {
	return filepath.Join(b.dir, strings.Replace(digest, ":", "-", 1))
}

// hold keeps a blob from being trimmed until it is released.
func (b *Blobs) hold(digest string) *blob {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.held[digest]
	if h == nil {
		h = &blob{turn: make(chan struct{}, 1)}
		b.held[digest] = h
	}
	h.users++
	return h
}

func (b *Blobs) release(digest string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.held[digest]
	if h.users--; h.users == 0 && h.partial == nil {
		delete(b.held, digest)
	}
}

// ensure makes sure that a blob that is held is there. Of several callers one downloads, and the others wait. If
// that one fails, the next goes on where it was.
func (b *Blobs) ensure(ctx context.Context, h *blob, d descriptor, download func(*partial) error) error {
	select {
	case h.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-h.turn }()
	if there, err := b.there(d); there || err != nil {
		return err
	}
	if h.partial == nil {
		p, err := newPartial(b.dir)
		if err != nil {
			return err
		}
		h.partial = p
	}
	if err := download(h.partial); err != nil {
		// What arrived of it is kept for the next try, but not where others may need the space.
		if h.partial.size == 0 || errors.Is(err, pool.ErrFull) {
			h.partial.file.Close()
			h.partial = nil
		}
		return err
	}
	return b.publish(h, d.Digest)
}

// publish gives the file that has arrived its name.
func (b *Blobs) publish(h *blob, digest string) error {
	err := tmpfile.Publish(h.partial.file, b.path(digest))
	h.partial.file.Close()
	h.partial = nil
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return pool.Full(err)
}

// there reports whether a blob is there, and notes that it is used. A file of another size than the manifest says
// is checked: either it is damaged, and removed, or the manifest lies.
func (b *Blobs) there(d descriptor) (bool, error) {
	path := b.path(d.Digest)
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if fi.Size() == d.Size {
		return true, os.Chtimes(path, time.Time{}, time.Now())
	}
	f, err := b.open(d.Digest)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if _, err := io.Copy(io.Discard, f); err != nil { // it was damaged, and is removed
		return false, nil
	}
	return false, fmt.Errorf("%w: %s has %d bytes, and the manifest says %d; push the image again",
		ErrInvalid, d.Digest, fi.Size(), d.Size)
}

// open returns a reader that verifies a blob while it is read.
func (b *Blobs) open(digest string) (*verified, error) {
	f, err := os.Open(b.path(digest))
	if err != nil {
		return nil, err
	}
	return &verified{f: f, sum: sha256.New(), digest: digest}, nil
}

// verified reads a blob. At its end it returns [ErrInvalid] instead of [io.EOF] if the bytes are not those that
// were written, and removes the blob, so that the next pull gets it anew.
type verified struct {
	f      *os.File
	sum    hash.Hash
	digest string
}

func (v *verified) Read(b []byte) (int, error) {
	n, err := v.f.Read(b)
	v.sum.Write(b[:n])
	if err == io.EOF && digestOfHash(v.sum) != v.digest {
		damaged := fmt.Errorf("%w: %s was damaged on the pool's disk, and is removed; the next try pulls it again",
			ErrInvalid, v.digest)
		return n, errors.Join(damaged, tmpfile.Remove(v.f.Name()))
	}
	return n, err
}

func (v *verified) Close() error { return v.f.Close() }

// small returns a blob of at most maxManifest bytes that is there and whole.
func (b *Blobs) small(digest string) ([]byte, bool) {
	f, err := b.open(digest)
	if err != nil {
		return nil, false
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	return content, err == nil && len(content) <= maxManifest
}

// keep stores a small blob that is held.
func (b *Blobs) keep(ctx context.Context, h *blob, digest string, content []byte) error {
	return b.ensure(ctx, h, descriptor{Digest: digest, Size: int64(len(content))}, func(p *partial) error {
		if err := p.reset(); err != nil {
			return err
		}
		_, err := p.Write(content)
		return err
	})
}

// Trim removes the blobs that were used longest ago until the others have at most budget bytes, and
// returns how many bytes it removed. Blobs in use stay, and count. It also drops what has arrived of
// downloads that nobody goes on with, so call it now and then, and not after each error.
func (b *Blobs) Trim(budget int64) (removed int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dropPartials()
	all, total, err := b.list()
	if err != nil {
		return 0, err
	}
	slices.SortFunc(all, func(x, y fs.FileInfo) int { return x.ModTime().Compare(y.ModTime()) })
	for _, fi := range all {
		if total-removed <= budget {
			break
		}
		if digest, _ := digestIn(fi.Name()); b.held[digest] != nil {
			continue
		}
		if err := tmpfile.Remove(filepath.Join(b.dir, fi.Name())); err != nil {
			return removed, err
		}
		removed += fi.Size()
	}
	return removed, nil
}

// dropPartials is called with the lock held. Who has no user has nobody whose turn it is.
func (b *Blobs) dropPartials() {
	for digest, h := range b.held {
		if h.users == 0 {
			h.partial.file.Close()
			delete(b.held, digest)
		}
	}
}

// list returns the files of blobs, and their size in bytes.
func (b *Blobs) list() (all []fs.FileInfo, total int64, err error) {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			return nil, 0, err
		}
		if _, ok := digestIn(e.Name()); ok && fi.Mode().IsRegular() {
			all = append(all, fi)
			total += fi.Size()
		}
	}
	return all, total, nil
}
