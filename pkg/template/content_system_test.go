// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
)

// born is spec with a content.
var born = diskfs.Spec{Filesystem: "ext4", Size: 64 << 20, Content: "files"}

// TestResolves has a template whose content is not known when it is asked for.
func TestResolves(t *testing.T) {
	p := newPool(t, testenv.PoolKinds[0])
	var known atomic.Bool
	s := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(spec diskfs.Spec) (string, error) {
			if spec.Content != "" && !known.Load() {
				return "", ErrUnresolved
			}
			return fp, nil
		}
		c.Resolve = func(ctx context.Context, content string) error {
			if content != "files" {
				t.Errorf("content %q is resolved", content)
			}
			select {
			case <-ctx.Done():
			case <-time.After(300 * time.Millisecond):
				known.Store(true)
			}
			return ctx.Err()
		}
	})
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := s.Ensure(short, born)
	if !errors.Is(err, ErrBuilding) || !strings.Contains(err.Error(), "content files") || short.Err() != nil {
		t.Fatalf("a caller without time: %v, %v", err, short.Err())
	}
	tmpl, err := s.Ensure(t.Context(), born)
	if err != nil {
		t.Fatal(err)
	}
	defer tmpl.Close()
	if !tmpl.Spec.Equal(born) || tmpl.Bytes != born.Size {
		t.Errorf("the template is of %s, %d bytes", tmpl.Spec, tmpl.Bytes)
	}
}

// TestWithoutContent asks for a content that cannot be had: with a template of it from earlier times, and
// without.
func TestWithoutContent(t *testing.T) {
	p := newPool(t, testenv.PoolKinds[0])
	gone := NoContent(errors.New("content files: the registry does not answer"))
	failing := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(spec diskfs.Spec) (string, error) { return "", gone }
	})
	if _, err := failing.Ensure(t.Context(), born); !errors.Is(err, ErrNoContent) || err.Error() != gone.Error() {
		t.Errorf("without a template: %v", err)
	}
	tmpl, err := newStore(t, p, nil).Ensure(t.Context(), born)
	if err != nil {
		t.Fatal(err)
	}
	tmpl.Close()
	if tmpl, err = failing.Ensure(t.Context(), born); err != nil {
		t.Fatalf("with a template: %v", err)
	}
	tmpl.Close()
	other := born
	other.Content = "others"
	if _, err := failing.Ensure(t.Context(), other); !errors.Is(err, ErrNoContent) {
		t.Errorf("the template of another content: %v", err)
	}
	damaged := newStore(t, p, func(c *Config) {
		c.Fingerprint = func(diskfs.Spec) (string, error) { return "fedcba9876543210", nil }
		c.Format = func(context.Context, *os.File, diskfs.Spec) (Provenance, error) { return Provenance{}, gone }
	})
	if _, err := damaged.Ensure(t.Context(), born); !errors.Is(err, ErrNoContent) {
		t.Errorf("a content that cannot be read: %v", err)
	}
}

// TestDiskTemplate has one template for all sizes of a disk's content. It has no filesystem of its own.
func TestDiskTemplate(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			const bytes = 3<<20 + 4096
			store := func() *Store {
				return newStore(t, p, func(c *Config) {
					c.Format = func(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
						_, err := f.WriteAt([]byte("end"), bytes-3)
						return Provenance{Fingerprint: fp, Content: "sha256:00"}, errors.Join(err, f.Sync())
					}
				})
			}
			s := store()
			for i, size := range []int64{0, 4 << 20, 1 << 40} {
				tmpl, err := s.Ensure(t.Context(), diskfs.Spec{Filesystem: "raw", Size: size, Content: "disk"})
				if err != nil {
					t.Fatal(err)
				}
				if tmpl.Bytes != bytes || tmpl.Hit != (i > 0) || tmpl.Provenance.Content != "sha256:00" {
					t.Errorf("size %d: %d bytes, hit %v, %+v", size, tmpl.Bytes, tmpl.Hit, tmpl.Record)
				}
				tmpl.Close()
			}
			onlyTemplates(t, p, "raw-0m-"+fp)
			tmpl, err := store().Ensure(t.Context(), diskfs.Spec{Filesystem: "raw", Content: "disk"}) // another process
			if err != nil {
				t.Fatal(err)
			}
			tmpl.Close()
			if _, err := s.Ensure(t.Context(), diskfs.Spec{Filesystem: "raw", Size: 4 << 20}); !errors.Is(err, diskfs.ErrInvalid) {
				t.Errorf("an empty disk: %v", err)
			}
		})
	}
}

// TestTellsProgress reads what a caller waits for.
func TestTellsProgress(t *testing.T) {
	p := newPool(t, testenv.PoolKinds[0])
	release := make(chan struct{})
	s := newStore(t, p, func(c *Config) {
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			<-release
			return mkfs(ctx, f, spec)
		}
		c.Progress = func(spec diskfs.Spec) string { return "unpacking 45 % of " + spec.Content }
	})
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := s.Ensure(short, born)
	const want = "template ext4 64Mi content=files is being built: unpacking 45 % of files; Kubernetes will ask again"
	if err == nil || err.Error() != want {
		t.Errorf("%v, not %s", err, want)
	}
	close(release)
}

// TestTemplateIsPacked builds a template whose formatter leaves it in many pieces.
func TestTemplateIsPacked(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			s := newStore(t, p, func(c *Config) {
				c.Format = func(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
					for at := int64(0); at < 50; at++ {
						if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 60<<10), at*64<<10); err != nil {
							return Provenance{}, err
						}
					}
					return Provenance{Fingerprint: fp}, errors.Join(f.Truncate(100<<20), f.Sync())
				}
			})
			tmpl, err := s.Ensure(t.Context(), diskfs.Spec{Filesystem: "raw", Content: "disk"})
			if err != nil {
				t.Fatal(err)
			}
			defer tmpl.Close()
			if tmpl.Bytes != 100<<20 {
				t.Errorf("the template has %d bytes", tmpl.Bytes)
			}
			if n, err := fiemap.Count(tmpl.File); err != nil || n > fewExtents {
				t.Errorf("the template has %d extents: %v", n, err)
			}
			onlyTemplates(t, p, "raw-0m-"+fp)
		})
	}
}
