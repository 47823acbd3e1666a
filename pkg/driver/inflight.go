// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"sync"
)

// inflight lets one operation at a time work on a volume or a snapshot. Operations
// on different ones do not wait for each other, and none waits: what it cannot have
// is errBusy.
type inflight struct {
	mu   sync.Mutex
	keys map[string]bool
}

// start claims what a key names until done is called.
func (i *inflight) start(key string) (done func(), err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.keys[key] {
		return nil, fmt.Errorf("%s: %w", key, errBusy)
	}
	if i.keys == nil {
		i.keys = map[string]bool{}
	}
	i.keys[key] = true
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.keys, key)
	}, nil
}

// snapshotKey is the key of a snapshot; a volume's is its id.
func snapshotKey(id string) string { return "snapshot/" + id }
