// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/archive"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/watchedlist"
)

var (
	// ErrUnknown means that there is no such content, or that the namespace may not use it.
	ErrUnknown = errors.New("unknown content")
	// ErrResolving means that the digest of a content is being found out. The same call succeeds later.
	ErrResolving = errors.New("its digest is being found out")
	// ErrUnavailable means that the source of a content cannot be read.
	ErrUnavailable = errors.New("its source is not available")
	// ErrChanged means that a content is no longer the one whose identity was asked for.
	ErrChanged = errors.New("it has changed")
)

const (
	// lookInterval is the time between two looks at the list, and at the files that it names. Kubelet takes
	// a minute or more to bring a changed ConfigMap to a node.
	lookInterval = 10 * time.Second
	// tagLife is how long the digest of a tag counts before it is asked for again. Kubelet asks a registry
	// once for each container (imagePullPolicy: Always). A crowd of pods that start together ask once.
	tagLife = time.Minute
)

// Config says where contents come from. Path and NewFile are required; a content whose source is missing
// here is a condition.
type Config struct {
	// Path is the file that lists the contents.
	Path string
	// Dir is the directory of the files that the list names.
	Dir string
	// State is the path of a file that remembers digests, in a directory that nobody else may write to.
	// Empty means none.
	State string
	// Limits bound the archives of a content.
	Limits archive.Limits
	// NewFile opens an unnamed file in the pool: what a content is prepared in.
	NewFile func() (*os.File, error)

	// Resolve returns the digest of an image, "sha256:…", as its registry says it now.
	Resolve func(ctx context.Context, reference string) (digest string, err error)
	// Layers yields the layers of an image, the lowest first, as compressed or plain tars. The reference
	// has a digest. The reader is used until the next one is asked for. An error is the last thing it yields.
	Layers func(ctx context.Context, reference string) iter.Seq2[io.Reader, error]
	// Convert makes a raw disk of a file, in dst, which is empty.
	Convert func(ctx context.Context, dst, src *os.File) error
	// PullDisk makes a raw disk of the one in an image, in dst, which is empty. The reference has a digest.
	PullDisk func(ctx context.Context, dst *os.File, reference string) error
}

// Contents are the contents that the operator names.
type Contents struct {
	cfg     Config
	answers *answers
	reading sync.Mutex // held while the bytes of a file are hashed

	list *watchedlist.List[Content]

	mu       sync.Mutex
	measured map[string]archive.Summary // by digest
}

// New reads the file. What is looked at in the background ends with ctx.
func New(ctx context.Context, c Config) *Contents {
	return &Contents{
		cfg: c, list: watchedlist.Open(c.Path, format), answers: newAnswers(ctx, c.State),
		measured: map[string]archive.Summary{},
	}
}

// Run looks at the list, and at the files that it names, until ctx ends.
func (c *Contents) Run(ctx context.Context) {
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		c.list.Look()
		for _, content := range c.list.All() {
			// A digest that is there when somebody asks saves him a wait. A tag that is known is left alone.
			_, _ = c.digest(content, 0)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Check returns [ErrUnknown] if there is no such content, or if the namespace may not use it. The two look the
// same to who asks.
func (c *Contents) Check(name, namespace string) error {
	ok, instead := c.list.May(name, func(content Content) bool { return content.Namespaces.Allow(namespace) })
	if ok {
		return nil
	}
	return fmt.Errorf("%w: %.64q does not exist, or namespace %.64q may not use it; what it may use: %s",
		ErrUnknown, name, namespace, instead)
}

// Find returns a content, or [ErrUnknown].
func (c *Contents) Find(name string) (Content, error) {
	list := c.list.All()
	if i := slices.IndexFunc(list, func(c Content) bool { return c.Name == name }); i >= 0 {
		return list[i], nil
	}
	return Content{}, fmt.Errorf("%w: %.64q is not listed (any more)", ErrUnknown, name)
}

// Identity is what decides the bytes that a volume is born with.
type Identity struct {
	Digest  string // "sha256:…", of the file or of the image's manifest
	Kind    Kind
	Options Options
}

// Equal reports whether two identities have the same bytes.
func (i Identity) Equal(o Identity) bool { return reflect.DeepEqual(i, o) }

// Identity returns a content's identity as far as it is known. [ErrResolving] means that it is being found
// out, [ErrUnavailable] that it could not be. Both take microseconds.
func (c *Contents) Identity(name string) (Identity, error) {
	content, err := c.Find(name)
	if err != nil {
		return Identity{}, err
	}
	digest, err := c.digest(content, tagLife)
	if err != nil {
		return Identity{}, fmt.Errorf("content %q: %w", name, err)
	}
	return Identity{Digest: digest, Kind: content.Kind, Options: content.Options}, nil
}

// Resolve waits until the identity of a content is known. Errors are those of [Contents.Identity], and that
// of ctx.
func (c *Contents) Resolve(ctx context.Context, name string) error {
	for {
		_, err := c.Identity(name)
		if !errors.Is(err, ErrResolving) {
			return err
		}
		if err := c.answers.wait(ctx); err != nil {
			return fmt.Errorf("content %q: %w (%w)", name, ErrResolving, err)
		}
	}
}
