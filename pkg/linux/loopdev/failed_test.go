//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestFailedAttachLeavesNothing attaches to new devices, in ways that fail after the device
// was made.
func TestFailedAttachLeavesNothing(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	f := image(t, filepath.Join(dir, "file"))
	readOnly, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	directory, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer directory.Close()
	for name, try := range map[string]struct {
		backing *os.File
		says    string
	}{
		"not open for writing": {readOnly, "not open for writing"},
		"a directory":          {directory, "LOOP_CONFIGURE"},
	} {
		t.Run(name, func(t *testing.T) {
			const times = 32
			// Other tests run now, and make devices, but not so many again and again.
			var more []int
			for range 3 {
				before, err := existing()
				if err != nil {
					t.Fatal(err)
				}
				for range times {
					d, err := new(Allocator).Attach(try.backing, Options{NoDiscard: true})
					if err == nil || !strings.Contains(err.Error(), try.says) {
						t.Errorf("%v, want an error with %q", err, try.says)
					}
					if err == nil {
						d.Detach()
					}
				}
				after, err := existing()
				if err != nil {
					t.Fatal(err)
				}
				more = append(more, len(after)-len(before))
				if more[len(more)-1] < times/2 {
					break
				}
			}
			if slices.Min(more) >= times/2 {
				t.Errorf("%d attempts to attach left %v devices", times, more)
			}
			if found, err := Find(try.backing); err != nil || len(found) > 0 {
				t.Errorf("the file is attached to %v: %v", found, err)
			}
		})
	}
}

// TestAttachInOwnDev attaches to new devices where /dev is a tmpfs, as it is in the nodes of
// kind and minikube: the nodes of new devices do not appear there.
func TestAttachInOwnDev(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "file"))
	testenv.InOwnDev(t, func() {
		for range 4 {
			d, err := new(Allocator).Attach(f, Options{NoDiscard: true}) // on a device of its own
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := os.Stat(d.Path()); err == nil {
				t.Errorf("%s exists, so /dev is not a tmpfs", d.Path())
			}
			again, err := OpenBacked(f)
			if err != nil || again.Index() != d.Index() {
				t.Errorf("the file is on %v, want %s: %v", again, d.Path(), err)
			} else {
				again.Close()
			}
			if err := d.Detach(); err != nil {
				t.Error(err)
			}
			if err := Remove(d.Index()); err != nil {
				t.Error(err)
			}
		}
	})
	if found, err := Find(f); err != nil || len(found) > 0 {
		t.Errorf("the file is attached to %v: %v", found, err)
	}
}
