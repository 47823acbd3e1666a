// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

// resolveTime is how long a registry may take to say the digest of a tag.
const resolveTime = time.Minute

// digest returns the digest of a content, or starts to find it out. tagLife is how long that of a tag
// counts; 0 means forever.
func (c *Contents) digest(content Content, tagLife time.Duration) (string, error) {
	if content.Reference != "" {
		return c.digestOfImage(content.Reference, tagLife)
	}
	f, identity, err := c.open(content.File)
	if err != nil {
		return "", err
	}
	f.Close()
	return c.answers.ask(fileKey(content, identity), 0, func(ctx context.Context) (string, error) {
		return c.digestOfFile(ctx, content, identity)
	})
}

func (c *Contents) digestOfImage(reference string, life time.Duration) (string, error) {
	if digest := pinned(reference); digest != "" {
		return digest, nil
	}
	if c.cfg.Resolve == nil {
		return "", fmt.Errorf("%w: this plugin reads no registries", ErrUnavailable)
	}
	return c.answers.ask(imageKey(reference), life, func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, resolveTime)
		defer cancel()
		digest, err := c.cfg.Resolve(ctx, reference)
		if err != nil {
			return "", fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return digest, nil
	})
}

// The keys of the two kinds of sources. A file has another one whenever it is replaced or written to.
func fileKey(c Content, i watchedfile.Identity) string {
	return string(c.Kind) + " " + i.String() + " " + c.File
}
func imageKey(reference string) string { return "image " + reference }

// open opens a file in the directory of contents. A symbolic link could lead out of it, so that it is refused.
func (c *Contents) open(name string) (*os.File, watchedfile.Identity, error) {
	f, identity, err := openIn(c.cfg.Dir, name)
	switch {
	case errors.Is(err, syscall.ELOOP):
		err = fmt.Errorf("%w: %s is a symbolic link; put the file itself there", ErrUnavailable,
			filepath.Join(c.cfg.Dir, name))
	case err != nil:
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return f, identity, err
}

func openIn(dir, name string) (*os.File, watchedfile.Identity, error) {
	if dir == "" {
		return nil, watchedfile.Identity{}, errors.New("this plugin has no directory of contents")
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, watchedfile.Identity{}, err
	}
	defer d.Close()
	f, err := openat.Open(d, name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK)
	if err != nil {
		return nil, watchedfile.Identity{}, err
	}
	identity, err := watchedfile.Identify(f)
	if err != nil {
		f.Close()
		return nil, watchedfile.Identity{}, err
	}
	return f, identity, nil
}

// digestOfFile reads a file that has an identity. One file is read at a time: the disk is not faster for two. While a
// file is copied to its place, each look finds another identity. Only the one that lasts is worth reading.
func (c *Contents) digestOfFile(ctx context.Context, content Content, want watchedfile.Identity) (string, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	f, identity, err := c.open(content.File)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if identity != want {
		return "", changed(content.File)
	}
	digest, err := hashed(ctx, f, content.Kind)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if after, err := watchedfile.Identify(f); err != nil || after != want {
		return "", changed(content.File)
	}
	return digest, nil
}

// hashed returns the digest of a file, from its beginning: of all its bytes, or, if it is a disk, of its length
// and its data. A disk may be far larger than its data.
func hashed(ctx context.Context, f *os.File, kind Kind) (string, error) {
	h := sha256.New()
	if kind != Disk {
		_, err := io.Copy(h, &reader{ctx, f})
		return digestOf(h), err
	}
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	fmt.Fprintf(h, "disk of %d bytes\n", fi.Size())
	err = sparse.Hash(ctx, h, f)
	return digestOf(h), err
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

func changed(name string) error {
	return fmt.Errorf("%w: %s was written to or replaced meanwhile; try again", ErrChanged, name)
}

// reader reads until ctx ends.
type reader struct {
	ctx context.Context
	io.Reader
}

func (r *reader) Read(b []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}
