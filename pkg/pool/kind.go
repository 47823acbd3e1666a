// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"os"
	"path/filepath"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
)

// Kind says for people what the pool is on: btrfs or xfs, and for a loopback pool the file that
// the xfs is in.
func (p *Pool) Kind() string {
	st, err := fsctl.StatusOf(p.dir)
	if err != nil {
		return "unknown"
	}
	image := filepath.Join(filepath.Dir(p.root), loopbackImage)
	if _, err := os.Stat(image); err == nil && filepath.Base(p.root) == loopbackMount {
		return st.Type.Name() + " in " + image
	}
	return st.Type.Name()
}
