// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"os"
	"testing"
	"testing/fstest"
)

// TestSource checks that every change of the source changes its digest, and that tests do not
// count.
func TestSource(t *testing.T) {
	of := func(change func(fstest.MapFS)) string {
		t.Helper()
		files := fstest.MapFS{"init.go": {Data: []byte("package guest")}, "protocol.go": {Data: []byte("package guest\n")}}
		if change != nil {
			change(files)
		}
		sum, err := sourceDigest(files)
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	base := of(nil)
	for name, change := range map[string]func(fstest.MapFS){
		"a file changed": func(f fstest.MapFS) { f["init.go"].Data = []byte("package guest // mkfs twice") },
		"a new file":     func(f fstest.MapFS) { f["more.go"] = &fstest.MapFile{Data: []byte("package guest")} },
		"a removed file": func(f fstest.MapFS) { delete(f, "init.go") },
		"a renamed file": func(f fstest.MapFS) { f["a.go"] = f["init.go"]; delete(f, "init.go") },
	} {
		if of(change) == base {
			t.Errorf("%s: the digest is the same", name)
		}
	}
	if of(func(f fstest.MapFS) { f["init_test.go"] = &fstest.MapFile{Data: []byte("package guest")} }) != base {
		t.Error("a test changes the digest")
	}
	is, err := sourceDigest(os.DirFS("."))
	if err != nil || is != Source() {
		t.Errorf("this directory has the digest %s, the package says %s: %v", is, Source(), err)
	}
}
