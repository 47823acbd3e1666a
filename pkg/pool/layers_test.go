// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// TestLeast works in GiB.
func TestLeast(t *testing.T) {
	layer := func(total, available int64, shared bool, file ...int64) Layer {
		l := Layer{Path: "/node/pool.img", Status: fsctl.Status{Identity: fsctl.Identity{Type: fsctl.Ext4}, Total: total << 30, Available: available << 30}, Shared: shared}
		if file != nil {
			l.Size, l.Allocated = file[0]<<30, file[1]<<30
		}
		return l
	}
	for name, c := range map[string]struct {
		layers                     []Layer
		node                       size.Share
		total, available, headroom int64
		limit                      string
	}{
		"a disk of its own":                     {layers: []Layer{layer(100, 60, false)}, node: size.Share{Percent: 20}, total: 100, available: 60},
		"the node's own filesystem":             {layers: []Layer{layer(100, 60, true)}, node: size.Share{Percent: 20}, total: 100, available: 60, headroom: 20},
		"a sparse file, room below":             {layers: []Layer{layer(20, 20, false), layer(100, 60, true, 20, 0)}, total: 20, available: 20},
		"room below exactly":                    {layers: []Layer{layer(20, 20, false), layer(100, 20, true, 20, 0)}, total: 20, available: 20},
		"less room below":                       {layers: []Layer{layer(20, 20, false), layer(100, 3, true, 20, 0)}, total: 3, available: 3, limit: "3Gi free"},
		"some of it left to the node":           {layers: []Layer{layer(20, 20, false), layer(100, 30, true, 20, 0)}, node: size.Share{Percent: 20}, total: 10, available: 10, limit: "20Gi of it is left to the node"},
		"more left to the node than there is":   {layers: []Layer{layer(20, 20, false), layer(100, 10, true, 20, 0)}, node: size.Share{Percent: 20}, total: 0, available: 0, limit: "10Gi free"},
		"not the node's, so nothing left to it": {layers: []Layer{layer(20, 20, false), layer(100, 10, false, 20, 0)}, node: size.Share{Percent: 20}, total: 10, available: 10, limit: "10Gi free"},
		"written to":                            {layers: []Layer{layer(20, 15, false), layer(100, 3, true, 20, 5)}, total: 8, available: 3, limit: "3Gi free"},
		"a full file below a full filesystem":   {layers: []Layer{layer(20, 15, false), layer(100, 0, true, 20, 20)}, total: 20, available: 15},
		"freed above, not yet returned":         {layers: []Layer{layer(20, 20, false), layer(100, 0, true, 20, 5)}, total: 5, available: 5, limit: "has 0 bytes free"},
		"reserved above and not below":          {layers: []Layer{layer(20, 12, false), layer(100, 3, true, 20, 1)}, total: 4, available: 0, limit: "3Gi free"},
		"the filesystem keeps some for itself":  {layers: []Layer{layer(19, 19, false), layer(100, 10, true, 20, 1)}, total: 10, available: 10, limit: "10Gi free"},
		"three layers, the lowest is tight":     {layers: []Layer{layer(20, 20, false), layer(50, 50, false, 20, 0), layer(100, 3, true, 50, 0)}, total: 3, available: 3, limit: "3Gi free"},
		"three layers, tight but not for us":    {layers: []Layer{layer(20, 20, false), layer(50, 50, false, 20, 0), layer(100, 30, true, 50, 0)}, total: 20, available: 20},
		"three layers, the middle one is tight": {layers: []Layer{layer(20, 20, false), layer(50, 7, false, 20, 0), layer(100, 90, true, 50, 43)}, total: 7, available: 7, limit: "7Gi free"},
	} {
		t.Run(name, func(t *testing.T) {
			s := least(c.layers, c.node)
			if s.Total != c.total<<30 || s.Available != c.available<<30 || s.Headroom != c.headroom<<30 {
				t.Errorf("total %s, available %s, headroom %s; want %d, %d, %d Gi", size.Format(s.Total), size.Format(s.Available), size.Format(s.Headroom), c.total, c.available, c.headroom)
			}
			if (s.Limit == "") != (c.limit == "") || !strings.Contains(s.Limit, c.limit) {
				t.Errorf("the limit is %q, want %q", s.Limit, c.limit)
			}
		})
	}
}
