// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import "sync"

// misses remembers volumes whose template was missing when they were asked for. Their callers may
// give up while it is built, and ask again when it is there: that is no hit.
//
// It forgets a volume that is made. Of those that are never asked for again, because their pods
// are gone, it keeps the latest.
type misses struct {
	mu    sync.Mutex
	noted map[string]int // by volume id: in the order of asking
	count int
}

// mostMisses bounds the memory. It is far above the number of volumes that wait at one time: a
// node has 110 pods unless it is configured otherwise.
const mostMisses = 1024

// note remembers that a volume's template was missing.
func (m *misses) note(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.noted == nil {
		m.noted = map[string]int{}
	}
	if _, known := m.noted[id]; !known && len(m.noted) >= mostMisses {
		oldest := id
		for other, at := range m.noted {
			if first, any := m.noted[oldest]; !any || at < first {
				oldest = other
			}
		}
		delete(m.noted, oldest)
	}
	m.count++
	m.noted[id] = m.count
}

// has reports whether a volume's template was missing.
func (m *misses) has(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.noted[id] > 0
}

// forget forgets a volume.
func (m *misses) forget(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.noted, id)
}
