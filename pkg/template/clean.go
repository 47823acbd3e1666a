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
	Content    string    // the operator's name of what is inside; "" if that is nothing, or the record is damaged
	Extents    int       // of the image: what a clone costs, 10 to 24 µs each
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
		if err = s.lookAt(e, &t); errors.Is(err, os.ErrNotExist) {
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

// lookAt completes what is said of a template.
func (s *Store) lookAt(e entry, t *Cached) error {
	f, err := s.open(e.key)
	if err != nil {
		return err
	}
	defer f.Close()
	if r, _, err := readRecord(f, e.key); err == nil {
		t.Content = r.Spec.Content
	}
	bytes, err := fiemap.Unshared(f)
	if err != nil {
		return err
	}
	t.Frees = min(bytes, e.bytes)
	t.Extents, err = fiemap.Count(f)
	return err
}

// Remove removes a template, unless a process builds or replaces it: then removed is false.
// Clones are not affected: they share extents, not names. The lockfile stays.
func (s *Store) Remove(key string) (removed bool, err error) {
	if !keyPattern.MatchString(key) {
		return false, fmt.Errorf("%q is not the name of a template", key)
	}
	return s.remove(key, func() bool { return true })
}
