// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disktest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/disks"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

func init() {
	if guest.IsInit() {
		guest.Main()
	}
	pool.MakeRoom = "make room on the filesystem of Options.Cache"
}

// cache is an open cache directory. It stays open until the process ends.
type cache struct {
	pool      *pool.Pool
	templates *template.Store
}

var (
	mu     sync.Mutex
	caches = map[string]*cache{} // by path
)

// newDisk makes a disk without a name, of a template that it builds if need be.
func newDisk(ctx context.Context, o Options, spec diskfs.Spec, dir string) (*disks.Disk, error) {
	c, err := cacheAt(o.Cache)
	if err != nil {
		return nil, err
	}
	if dir == "" {
		dir = c.pool.Root()
	}
	source := disks.Source{Spec: spec}
	if fs, err := diskfs.Lookup(spec.Filesystem); err != nil {
		return nil, err
	} else if fs.Formatted() {
		t, err := c.templates.Ensure(ctx, spec)
		if err != nil {
			return nil, err
		}
		defer t.Close()
		source.File = t.File
	}
	return source.New(ctx, dir)
}

// cacheAt opens the cache in a directory, once in a process.
func cacheAt(dir string) (*cache, error) {
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("%w; set Options.Cache", err)
		}
		dir = filepath.Join(user, "csi-disktemplate", "disktest")
	}
	mu.Lock()
	defer mu.Unlock()
	if c := caches[dir]; c != nil {
		return c, nil
	}
	p, err := pool.OpenCache(dir)
	if err != nil {
		return nil, err
	}
	f, err := vmformat.New(vmformat.Config{CacheDir: p.CacheDir()})
	if err != nil {
		return nil, err
	}
	caches[dir] = &cache{pool: p, templates: disks.Templates(p, f)}
	return caches[dir], nil
}
