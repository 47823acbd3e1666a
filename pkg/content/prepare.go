// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/archive"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedfile"
)

// Prepared is a content as the formatter takes it, in an unnamed file of the pool. The caller closes it.
type Prepared struct {
	File    *os.File
	Layers  []archive.Layer // the plain archives in it, the lowest layer first; nil for a disk
	Summary archive.Summary // of all layers
}

// Prepare makes a file of a content that has an identity. Errors are [ErrUnknown], [ErrUnavailable],
// [ErrChanged], [pool.ErrFull], those of [archive.Writer.Add], and those of the functions of [Config].
func (c *Contents) Prepare(ctx context.Context, name string, want Identity) (*Prepared, error) {
	content, err := c.Find(name)
	if err != nil {
		return nil, err
	}
	if (Identity{want.Digest, content.Kind, content.Options}).Equal(want) {
		var p *Prepared
		if p, err = c.prepare(ctx, content, want.Digest); err == nil {
			c.note(want, p.Summary)
			return p, nil
		}
	} else {
		err = fmt.Errorf("%w: its entry in the list is another one than before; try again", ErrChanged)
	}
	return nil, fmt.Errorf("content %q: %w", name, pool.Full(err))
}

// Measured returns the summary of a content that this process has prepared before. With it a volume that is too
// small for the content is refused without preparing it again.
func (c *Contents) Measured(i Identity) (s archive.Summary, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, ok = c.measured[i.Digest]
	return s, ok
}

func (c *Contents) note(i Identity, s archive.Summary) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.measured) >= maxAnswers {
		clear(c.measured)
	}
	c.measured[i.Digest] = s
}

func (c *Contents) prepare(ctx context.Context, content Content, digest string) (*Prepared, error) {
	f, err := c.cfg.NewFile()
	if err != nil {
		return nil, err
	}
	p := &Prepared{File: f}
	switch {
	case content.Reference != "":
		err = c.fromImage(ctx, p, content, digest)
	default:
		err = c.fromFile(ctx, p, content, digest)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return p, nil
}

// fromFile uses a file of the directory of contents.
func (c *Contents) fromFile(ctx context.Context, p *Prepared, content Content, digest string) error {
	src, before, err := c.open(content.File)
	if err != nil {
		return err
	}
	defer src.Close()
	if c.answers.known(fileKey(content, before)) != digest {
		return changed(content.File)
	}
	use := c.unpackFile
	if content.Kind == Disk {
		use = c.convert
	}
	got, err := use(ctx, p, src)
	after, statErr := watchedfile.Identify(src)
	switch {
	// A file that is written to may look damaged.
	case statErr != nil || after != before:
		return changed(content.File)
	case err != nil:
		return err
	case got != digest:
		c.answers.forget(fileKey(content, before))
		return changed(content.File)
	}
	return nil
}

// unpackFile makes a plain archive of a file, and returns the digest of what it read.
func (c *Contents) unpackFile(ctx context.Context, p *Prepared, src *os.File) (string, error) {
	h := sha256.New()
	err := c.unpack(p, func(w *archive.Writer) error { return p.add(ctx, w, io.TeeReader(src, h)) })
	return digestOf(h), err
}

// convert makes a raw disk of a file, and returns the digest of the file.
func (c *Contents) convert(ctx context.Context, p *Prepared, src *os.File) (string, error) {
	if c.cfg.Convert == nil {
		return "", fmt.Errorf("%w: this plugin converts no disks", ErrUnavailable)
	}
	digest, err := hashed(ctx, src, Disk)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	return digest, c.cfg.Convert(ctx, p.File, src)
}

// fromImage uses an image. The functions of [Config] check what they read against the digest.
func (c *Contents) fromImage(ctx context.Context, p *Prepared, content Content, digest string) error {
	reference := pin(content.Reference, digest)
	switch {
	case content.Kind == Disk && c.cfg.PullDisk != nil:
		return c.cfg.PullDisk(ctx, p.File, reference)
	case content.Kind == Disk || c.cfg.Layers == nil:
		return fmt.Errorf("%w: this plugin reads no registries", ErrUnavailable)
	}
	return c.unpack(p, func(w *archive.Writer) error {
		for layer, err := range c.cfg.Layers(ctx, reference) {
			if err == nil {
				err = p.add(ctx, w, layer)
			}
			if err != nil {
				return fmt.Errorf("layer %d of %s: %w", len(p.Layers)+1, reference, err)
			}
		}
		if len(p.Layers) == 0 {
			return errors.New("it has no layers")
		}
		return nil
	})
}

// unpack makes plain archives.
func (c *Contents) unpack(p *Prepared, add func(*archive.Writer) error) error {
	w := archive.NewWriter(p.File, c.cfg.Limits)
	err := add(w)
	p.Summary = w.Summary()
	return err
}

func (p *Prepared) add(ctx context.Context, w *archive.Writer, src io.Reader) error {
	layer, err := w.Add(ctx, src)
	if err == nil {
		p.Layers = append(p.Layers, layer)
	}
	return err
}
