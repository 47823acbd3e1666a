// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"errors"
	"os"
)

// Load counts the builds that have a slot, and those that wait for one, or for another process that builds the
// same template.
func (s *Store) Load() (underWay, waiting int) { return s.queue.count() }

// Total counts the templates of the pool, and sums up the space that they have allocated, in bytes.
func (s *Store) Total() (templates int, bytes int64, err error) {
	keys, err := s.cfg.Pool.Templates()
	if err != nil {
		return 0, 0, err
	}
	for _, key := range keys {
		st, err := s.cfg.Pool.StatTemplate(key)
		if errors.Is(err, os.ErrNotExist) { // removed meanwhile
			continue
		}
		if err != nil {
			return 0, 0, err
		}
		templates++
		bytes += st.Allocated
	}
	return templates, bytes, nil
}
