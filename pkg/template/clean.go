// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
)

// Cached is a template of the pool, as an operator sees it.
type Cached struct {
	Key        string
	Filesystem string
	Size       int64     // of the volumes that are cloned from it, in bytes; 0 if its name tells none
	Takes      int64     // of the pool, in bytes
	Frees      int64     // how much of that is free when it is removed: volumes keep what they share
	Used       time.Time // its last use, to within an hour; zero if that is unknown
	Holder     string    // the process that builds or replaces it at the moment, for a message; "" if there is none
}

// List returns the templates of the pool, by key. It changes nothing, and reads no content, so
// that damaged templates are listed too.
func (s *Store) List() ([]Cached, error) {
	entries, err := s.entries(nil)
	if err != nil {
		return nil, err
	}
	var all []Cached
	for _, e := range entries {
		t := Cached{Key: e.key, Takes: e.bytes, Used: e.used}
		t.Filesystem, t.Size = describe(e.key)
		if t.Frees, err = s.unshared(e); errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("template %s: %w", e.key, err)
		}
		if t.Holder, err = s.cfg.Pool.LockHolder(e.key); err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

// describe reads what a key says: see [Key].
func describe(key string) (filesystem string, size int64) {
	parts := strings.Split(key, "-")
	mib, err := strconv.ParseInt(strings.TrimSuffix(parts[1], "m"), 10, 32)
	if err != nil {
		return parts[0], 0
	}
	return parts[0], mib * diskfs.MiB
}

// unshared is the space that the removal of a template frees.
func (s *Store) unshared(e entry) (int64, error) {
	f, err := s.open(e.key)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	bytes, err := fiemap.Unshared(f)
	return min(bytes, e.bytes), err
}

// Remove removes a template, unless a process builds or replaces it: then removed is false.
// Clones are not affected: they share extents, not names. The lockfile stays.
func (s *Store) Remove(key string) (removed bool, err error) {
	if !keyPattern.MatchString(key) {
		return false, fmt.Errorf("%q is not the name of a template", key)
	}
	return s.remove(key, func() bool { return true })
}
