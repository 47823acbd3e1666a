// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"errors"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// maxShown is how many contents are shown one by one.
const maxShown = 20

// Conditions are those that leave the plugin ready: the list cannot be read, an entry of it is wrong, the
// source of a content cannot be read. At most 20 of each are shown.
func (c *Contents) Conditions() []health.Condition {
	return append(c.list.Conditions(health.ContentFailed), c.sourceConditions()...)
}

// Requirement is that each listed content can be had.
func (c *Contents) Requirement() health.Requirement {
	return health.Requirement{Name: "contents", Look: c.Conditions, Good: func() string {
		return fmt.Sprintf("the sources of %d listed contents can be read", len(c.list.All()))
	}}
}

func (c *Contents) sourceConditions() (found []health.Condition) {
	for _, d := range c.Describe() {
		if d.Err != nil && !errors.Is(d.Err, ErrResolving) && len(found) < maxShown {
			found = append(found, failed(d.Name, fmt.Sprintf("content %q: %v", d.Name, d.Err), "the plugin tries again"))
		}
	}
	return found
}

func failed(object, text, remedy string) health.Condition {
	return health.Condition{
		Code: health.ContentFailed, Object: object, Severity: health.Degraded, Text: text, Remedy: remedy, StillReady: true,
	}
}
