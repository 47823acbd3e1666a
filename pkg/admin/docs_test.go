// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/shapes"
)

func TestShapesAreDocumented(t *testing.T) {
	shapes.AreDocumented(t, "../../docs/json.md", "pkg/admin", "data.go", "calls.go", "why.go", "../health/requirement.go")
}
