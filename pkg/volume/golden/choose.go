// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/meant"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Choose returns the generations that texts name, each once, in the order of [Store.List]: one that is named with
// @NUMBER, or else all of a golden. If there is none of a text, the error is [errdefs.ErrNotFound] and names what may
// be meant; if a text is no name, it is [errdefs.ErrInvalid]. It is of all texts.
func (s *Store) Choose(texts ...string) ([]Generation, error) {
	all, err := s.List()
	if err != nil {
		return nil, err
	}
	chosen := map[Generation]bool{}
	var errs []error
	for _, text := range texts {
		found, err := choose(all, text)
		errs = append(errs, err)
		for _, g := range found {
			chosen[g] = true
		}
	}
	return slices.DeleteFunc(all, func(g Generation) bool { return !chosen[g] }), errors.Join(errs...)
}

// choose returns the generations, of all, that a text names.
func choose(all []Generation, text string) (found []Generation, err error) {
	want, err := ParseGeneration(text)
	if err != nil {
		return nil, err
	}
	var others []Generation // of the same golden
	for _, g := range all {
		switch {
		case g.Name != want.Name:
		case want.Number == 0 || want.Number == g.Number:
			found = append(found, g)
		default:
			others = append(others, g)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	return nil, fmt.Errorf("%w: there is no golden %s on this node; %s",
		errdefs.ErrNotFound, text, whatIsMeant(all, others, want.Name))
}

// whatIsMeant says what the name of a golden that does not exist may mean.
func whatIsMeant(all, generations []Generation, want Name) string {
	var near []string
	for _, g := range generations {
		near = append(near, g.String())
	}
	if len(near) > 0 {
		return "it has " + strings.Join(near, ", ")
	}
	for _, g := range all {
		near = append(near, g.Name.String())
	}
	return meant.Say(want.String(), near, "`csi-disktemplate golden list` shows those that are there")
}

// RemoveDurably removes generations so that a power cut does not bring them back.
func (s *Store) RemoveDurably(generations ...Generation) error {
	if len(generations) == 0 {
		return nil
	}
	for _, g := range generations {
		if err := s.Remove(g); err != nil {
			return err
		}
	}
	return tmpfile.SyncDir(filepath.Dir(s.Path(Generation{})))
}
