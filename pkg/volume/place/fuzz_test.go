// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// FuzzTarget checks that every target path lies below the root or is refused.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{
		"", ".", "..", "a/b", "a\x00b", "/var/lib/kubelet", "/var/lib/kubelet/", "/var/lib/kubelet/x", "/var/lib/kubelet/../x", "/var/lib/kubelet/..x",
		"/var/lib/kubeletx", "/var/lib/kubelet//x", "/var/lib/kubelet/x/.", "/", "\xff", strings.Repeat("x", 4096),
	} {
		f.Add(s, "/var/lib/kubelet")
		f.Add(s, "/")
	}
	f.Fuzz(below)
}

func below(t *testing.T, target, root string) {
	t.Helper()
	if !filepath.IsAbs(root) {
		root = "/var/lib/kubelet"
	}
	r := &Root{path: filepath.Clean(root)} // as filepath.Abs does
	rel, err := r.Rel(target)
	if err != nil {
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%q: %v", target, err)
		}
		return
	}
	if !filepath.IsLocal(rel) || rel == "." || filepath.Clean(rel) != rel || filepath.Join(r.path, rel) != filepath.Clean(target) || strings.ContainsRune(rel, 0) {
		t.Errorf("%q is %q below %q", target, rel, r.path)
	}
	for _, name := range strings.Split(strings.Trim(target, "/"), "/") {
		if name == "" || name == "." || name == ".." {
			t.Errorf("%q is accepted", target)
		}
	}
}
