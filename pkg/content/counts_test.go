// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import "testing"

// TestCounts counts a content whose file is there, and one whose file is missing.
func TestCounts(t *testing.T) {
	n := newNode(t)
	n.put("there.tar", []byte("bytes"))
	n.list("- {name: there, tar: there.tar, namespaces: [ci]}", "- {name: missing, tar: missing.tar, namespaces: [ci]}")
	if err := n.Resolve(t.Context(), "there"); err != nil {
		t.Fatal(err)
	}
	if got := n.Counts(); got[Known] != 1 || got[Failing] != 1 || got[Resolving] != 0 || len(got) != len(States) {
		t.Errorf("counted %v", got)
	}
}
