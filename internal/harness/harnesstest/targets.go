// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package harnesstest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// BadTarget is a path that no volume can be published at.
type BadTarget struct {
	Path string
	// Below tells that the path is spelled as one below kubelet's directory. Then there can
	// be no volume to unpublish, which is fine; any other path is refused for unpublishing too.
	Below bool
}

// BadTargets lays out below kubelet's directory what bad targets need, and returns them by
// name. What was laid out must be untouched, and nothing made outside, when the test ends.
func BadTargets(t testing.TB, kubelet string) map[string]BadTarget {
	t.Helper()
	base, outside := filepath.Join(kubelet, "pods", "bad"), testenv.Dir(t)
	file := filepath.Join(base, "file")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(base, "real"), 0o755),
		os.WriteFile(file, nil, 0o644),
		os.Symlink(outside, filepath.Join(base, "link")),
		os.Symlink("real", filepath.Join(base, "inner")),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
			t.Errorf("something was made outside: %v %v", entries, err)
		}
		if entries, err := os.ReadDir(filepath.Join(base, "real")); err != nil || len(entries) > 0 {
			t.Errorf("something was made behind a link: %v %v", entries, err)
		}
		for _, left := range []string{"file", "link", "inner"} {
			if _, err := os.Lstat(filepath.Join(base, left)); err != nil {
				t.Errorf("a path that is not a volume was removed: %v", err)
			}
		}
	})
	return map[string]BadTarget{
		"a file":               {file, true},
		"a symlink":            {filepath.Join(base, "inner"), true},
		"a symlink outside":    {filepath.Join(base, "link"), true},
		"below a symlink":      {filepath.Join(base, "link", "mount"), true},
		"below a file":         {filepath.Join(file, "mount"), true},
		"without a parent":     {filepath.Join(base, "missing", "mount"), true},
		"a name of 300 bytes":  {filepath.Join(base, strings.Repeat("n", 300)), true},
		"a path of 5000 bytes": {filepath.Join(base, strings.Repeat("/n", 2500)), true},
		"outside":              {filepath.Join(outside, "mount"), false},
		"outside by dots":      {kubelet + "/../" + filepath.Base(outside) + "/mount", false},
		"relative":             {"pods/bad/real/mount", false},
		"kubelet's directory":  {kubelet, false},
		"the root directory":   {"/", false},
		"with NUL":             {filepath.Join(base, "real") + "/a\x00b", false},
	}
}
