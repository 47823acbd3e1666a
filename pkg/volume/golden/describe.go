// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Described is a generation with its record.
type Described struct {
	Held
	Record Record
	Own    int64 // bytes that no other file of the pool shares: what is freed if the generation goes
}

// Shared are the bytes of the generation that other files of the pool share.
func (d Described) Shared() int64 { return d.Bytes - d.Own }

// Describe reads what there is to know of a generation. Errors are those of [Store.Open]. It asks the
// filesystem for each extent, which takes longer than [Store.Look].
func (s *Store) Describe(g Generation) (Described, error) {
	held, err := s.Look(g)
	if err != nil {
		return Described{}, err
	}
	golden, err := s.Open(g)
	if err != nil {
		return Described{}, err
	}
	defer golden.Close()
	own, err := fiemap.Unshared(golden.File)
	return Described{held, golden.Record, min(own, held.Bytes)}, err // xfs may give a file space meanwhile
}

// DescribeAll describes all generations that can be read, as [Store.List] lists them. The error is of all others.
// It leaves out those that went meanwhile, or that a power cut tore.
func (s *Store) DescribeAll() (all []Described, err error) {
	list, err := s.List()
	errs := []error{err}
	for _, g := range list {
		d, err := s.Describe(g)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
		case err != nil:
			errs = append(errs, err)
		default:
			all = append(all, d)
		}
	}
	return all, errors.Join(errs...)
}
