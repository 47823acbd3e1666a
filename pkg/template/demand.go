// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"errors"
	"fmt"
	"maps"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Demand is what of a template is worth keeping ready, and how many of it, for the next process.
// This package only keeps it, with the template's time of use.
type Demand map[string]int

// SetDemands notes the demand of each template by its key. A template that is left out has none.
func (s *Store) SetDemands(demands map[string]Demand) error {
	had, err := s.Demands()
	if err != nil {
		return err
	}
	var errs []error
	for key := range had {
		if demands[key] == nil {
			errs = append(errs, s.cfg.Pool.Note(key, pool.NoteAttr, nil))
		}
	}
	for key, d := range demands {
		if !maps.Equal(d, had[key]) {
			errs = append(errs, s.cfg.Pool.Note(key, pool.NoteAttr, d))
		}
	}
	return errors.Join(errs...)
}

// Demands returns the demand of each template that has one, by its key. It includes templates
// that other formatters made.
func (s *Store) Demands() (map[string]Demand, error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return nil, err
	}
	demands := map[string]Demand{}
	for _, key := range keys {
		var d Demand
		err := s.cfg.Pool.Noted(key, pool.NoteAttr, &d)
		if errors.Is(err, pool.ErrNoRecord) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		demands[key] = d
	}
	return demands, nil
}

// Describe returns what the template of a key holds. It reads the record and no content.
func (s *Store) Describe(key string) (diskfs.Spec, error) {
	r, err := s.Record(key)
	return r.Spec, err
}

// Record returns how the template of a key was made. It reads no content. Errors are [ErrCorrupt], or
// [os.ErrNotExist] if there is no such template.
func (s *Store) Record(key string) (Record, error) {
	if !keyPattern.MatchString(key) {
		return Record{}, fmt.Errorf("%w: %.80q is not the name of a template", os.ErrNotExist, key)
	}
	f, err := s.open(key)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	r, _, err := readRecord(f, key)
	return r, err
}
