// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package golden

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestChoose names generations as people type them.
func TestChoose(t *testing.T) {
	all := []Generation{
		{Name{"", "go-modules"}, 1}, {Name{"ci", "cache"}, 1}, {Name{"ci", "cache"}, 12}, {Name{"shop", "cache"}, 3},
	}
	for text, want := range map[string]string{
		"ci/cache":     "[ci/cache@1 ci/cache@12]",
		"ci/cache@12":  "[ci/cache@12]",
		"go-modules":   "[go-modules@1]",
		"go-modules@1": "[go-modules@1]",
	} {
		if found, err := choose(all, text); err != nil || fmt.Sprint(found) != want {
			t.Errorf("%s: %v, want %s: %v", text, found, want, err)
		}
	}
	for text, c := range map[string]struct {
		kind error
		says string
	}{
		"ci/cache@2":    {errdefs.ErrNotFound, "there is no golden ci/cache@2 on this node; it has ci/cache@1, ci/cache@12"},
		"ci/cahce":      {errdefs.ErrNotFound, "did you mean ci/cache?"},
		"cache":         {errdefs.ErrNotFound, "did you mean ci/cache or shop/cache?"},
		"ci/go-modules": {errdefs.ErrNotFound, "did you mean go-modules?"},
		"ci/database":   {errdefs.ErrNotFound, "`csi-disktemplate golden list` shows"},
		"ci/cache@0":    {errdefs.ErrInvalid, "the number of a generation"},
		"ci/Cache":      {errdefs.ErrInvalid, "must be NAMESPACE/NAME"},
		"../../etc":     {errdefs.ErrInvalid, "must be NAMESPACE/NAME"},
	} {
		if found, err := choose(all, text); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || found != nil {
			t.Errorf("%s: %v: %v; want %q", text, found, err, c.says)
		}
	}
}
