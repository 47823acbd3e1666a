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

func (c *Contents) sourceConditions() (found []health.Condition) {
	for _, content := range c.list.All() {
		if err := c.sourceError(content); err != nil && len(found) < maxShown {
			found = append(found, failed(content.Name, fmt.Sprintf("content %q: %v", content.Name, err),
				"the plugin tries again"))
		}
	}
	return found
}

// sourceError returns why the source of a content cannot be read, or could not be the last time.
func (c *Contents) sourceError(content Content) error {
	_, err := c.digest(content, 0)
	if errors.Is(err, ErrResolving) {
		return nil
	}
	if err == nil && content.Reference != "" {
		// An older digest counts. All the same the operator wants to know.
		err = c.answers.failure(imageKey(content.Reference))
	}
	return err
}

func failed(object, text, remedy string) health.Condition {
	return health.Condition{
		Code: health.ContentFailed, Object: object, Severity: health.Degraded, Text: text, Remedy: remedy, StillReady: true,
	}
}
