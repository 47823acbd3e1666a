// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package quota

// Total counts the inline volumes of the node, and sums up their sizes in bytes, at most to the largest int64.
func (l *Ledger) Total() (volumes int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	is := l.node.usage()
	return is.volumes, is.bytes
}
