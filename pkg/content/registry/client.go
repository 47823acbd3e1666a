// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"golang.org/x/sync/errgroup"
)

const (
	// atOnce is how many layers of an image are pulled at once: more connections bring a registry's node
	// no more bytes, and delay the volumes' own I/O.
	atOnce = 3
	// maxDepth is how many indexes may lead to an image.
	maxDepth = 3
	// defaultIdle is longer than the pauses of registries that fetch a layer from elsewhere first.
	defaultIdle = 30 * time.Second
)

// Config says how registries are spoken to. The zero value pulls public images.
type Config struct {
	// Credentials is a directory with docker config files (config.json, .dockerconfigjson), or with
	// directories of them. They are read anew for each pull. Credential helpers are not started.
	Credentials string
	// PlainHTTP lists registries, as HOST or HOST:PORT, that are spoken to by HTTP if they do not speak
	// HTTPS. Those on loopback addresses always are.
	PlainHTTP []string
	// Idle is how long a registry may send nothing; 0 is 30 s.
	Idle time.Duration
	// Room, if not nil, is asked before blobs of so many bytes are pulled. It returns an error if the pool has no
	// room for them.
	Room func(bytes int64) error

	pause time.Duration // the first one; tests do not wait
}

// Client pulls images. It may be used by several goroutines.
type Client struct{ config Config }

// New makes no connection.
func New(c Config) *Client {
	c.Idle = cmp.Or(c.Idle, defaultIdle)
	c.pause = cmp.Or(c.pause, firstPause)
	return &Client{config: c}
}

// Image is an image or an artifact whose blobs are all there. They stay until it is closed.
type Image struct {
	Digest string  // of its manifest, as "sha256:…"
	Layers []Layer // bottom first

	blobs *Blobs
	held  []string
}

// Layer is a tar archive, perhaps compressed.
type Layer struct {
	Digest      string
	Size        int64 // bytes, compressed
	Compression Compression

	blobs *Blobs
}

// Open opens the layer as it was pushed, that is compressed. The reader verifies the bytes again, and
// returns [ErrInvalid] at their end if the disk has changed them: read to the end.
func (l Layer) Open() (io.ReadCloser, error) {
	f, err := l.blobs.open(l.Digest)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s is gone from the pool; the next try pulls it again", ErrInvalid, l.Digest)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Close lets the image's blobs be trimmed. Open layers can be read on.
func (i *Image) Close() {
	for _, digest := range i.held {
		i.blobs.release(digest)
	}
	i.held = nil
}

func (i *Image) hold(digest string) *blob {
	i.held = append(i.held, digest)
	return i.blobs.hold(digest)
}

// Resolve asks the registry which manifest a reference means now, and returns its digest. Of an index it is the
// manifest for linux and this machine's architecture. A reference with a digest needs not be resolved: [Client.Pull]
// finds the manifest in an index too.
//
// Errors are [ErrReference], [ErrNotFound], [ErrDenied], [ErrUnreachable] or [ErrInvalid], or the cause of ctx.
func (c *Client) Resolve(ctx context.Context, reference string) (digest string, err error) {
	s, err := c.open(reference)
	if err != nil {
		return "", err
	}
	defer s.close()
	b, err := c.manifest(ctx, s, s.ref.Identifier())
	if err != nil {
		return "", s.explain(ctx, err)
	}
	m, err := parseManifest(b)
	if err != nil || !m.isIndex() {
		return digestOf(b), s.explain(ctx, err)
	}
	d, err := m.pick()
	return d.Digest, s.explain(ctx, err)
}

// Pull brings all blobs of an image into the pool, those that are not there yet. The reference must have a digest.
// If everything is there, the registry is not asked.
//
// Errors are those of [Client.Resolve], [pool.ErrFull], and what [Config.Room] returns.
func (c *Client) Pull(ctx context.Context, reference string, blobs *Blobs) (*Image, error) {
	s, err := c.open(reference)
	if err != nil {
		return nil, err
	}
	defer s.close()
	digest, ok := s.ref.(name.Digest)
	if !ok {
		return nil, fmt.Errorf("%w: %s has no digest; resolve it first", ErrReference, reference)
	}
	img := &Image{blobs: blobs}
	if err := c.pull(ctx, s, digest.DigestStr(), img); err != nil {
		img.Close()
		return nil, s.explain(ctx, err)
	}
	return img, nil
}

// open reads a reference, and the credentials for it.
func (c *Client) open(reference string) (*session, error) {
	ref, err := name.ParseReference(reference)
	if err == nil && slices.Contains(c.config.PlainHTTP, ref.Context().RegistryStr()) {
		ref, err = name.ParseReference(reference, name.Insecure)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %q; write registry/repository:tag, or registry/repository@sha256:digest",
			ErrReference, reference)
	}
	return c.newSession(ref)
}

func (c *Client) pull(ctx context.Context, s *session, digest string, img *Image) error {
	m, err := c.find(ctx, s, digest, img)
	if err != nil {
		return err
	}
	for _, d := range m.Layers {
		compression, err := compressionOf(d.MediaType)
		if err != nil {
			return err
		}
		img.Layers = append(img.Layers, Layer{Digest: d.Digest, Size: d.Size, Compression: compression, blobs: img.blobs})
	}
	blobs := m.blobs()
	held := make([]*blob, len(blobs))
	for i, d := range blobs {
		held[i] = img.hold(d.Digest)
	}
	if err := c.roomFor(img.blobs, blobs); err != nil {
		return err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, d := range blobs {
		group.Go(func() error {
			return img.blobs.ensure(groupCtx, held[i], d, func(p *partial) error {
				return c.retry(groupCtx, func() int64 { return p.size }, func() error { return s.download(groupCtx, p, d) })
			})
		})
	}
	return group.Wait()
}

// find returns the manifest of an image, and sets the image's digest. It goes through indexes.
func (c *Client) find(ctx context.Context, s *session, digest string, img *Image) (*manifest, error) {
	for range maxDepth {
		if _, err := blobName(digest); err != nil {
			return nil, err
		}
		held := img.hold(digest)
		b, there := img.blobs.small(digest)
		if !there {
			var err error
			if b, err = c.manifest(ctx, s, digest); err != nil {
				return nil, err
			}
		}
		m, err := parseManifest(b)
		if err != nil {
			return nil, err
		}
		if err := img.blobs.keep(ctx, held, digest, b); err != nil {
			return nil, err
		}
		if !m.isIndex() {
			img.Digest = digest
			return m, nil
		}
		d, err := m.pick()
		if err != nil {
			return nil, err
		}
		digest = d.Digest
	}
	return nil, fmt.Errorf("%w: more than %d indexes lead to it", ErrInvalid, maxDepth-1)
}

func (c *Client) manifest(ctx context.Context, s *session, identifier string) (b []byte, err error) {
	err = c.retry(ctx, func() int64 { return 0 }, func() error {
		b, err = s.fetchManifest(ctx, identifier)
		return err
	})
	return b, err
}

// roomFor asks whether there is room for what is not there yet.
func (c *Client) roomFor(b *Blobs, all []descriptor) error {
	if c.config.Room == nil {
		return nil
	}
	missing := map[string]int64{}
	for _, d := range all {
		if _, err := os.Lstat(b.path(d.Digest)); err != nil {
			missing[d.Digest] = d.Size
		}
	}
	var sum int64
	for _, n := range missing {
		sum += n
	}
	if sum == 0 {
		return nil
	}
	if err := c.config.Room(sum); err != nil {
		return &roomError{err}
	}
	return nil
}
