// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"sync"
)

// inflight lets one operation at a time work on a volume or a snapshot, or
// several that only read it. Operations on different ones do not wait for each
// other, and none waits: what it cannot have is errBusy.
type inflight struct {
	mu      sync.Mutex
	writers map[string]bool
	readers map[string]int
}

// start claims what a key names until done is called.
func (i *inflight) start(key string) (done func(), err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.writers[key] || i.readers[key] > 0 {
		return nil, fmt.Errorf("%s: %w", key, errBusy)
	}
	if i.writers == nil {
		i.writers = map[string]bool{}
	}
	i.writers[key] = true
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.writers, key)
	}, nil
}

// read keeps others from claiming what a key names, until done is called.
func (i *inflight) read(key string) (done func(), err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.writers[key] {
		return nil, fmt.Errorf("%s: %w", key, errBusy)
	}
	if i.readers == nil {
		i.readers = map[string]int{}
	}
	i.readers[key]++
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.readers[key]--; i.readers[key] == 0 {
			delete(i.readers, key)
		}
	}, nil
}

// snapshotKey is the key of a snapshot; a volume's is its id.
func snapshotKey(id string) string { return "snapshot/" + id }
