// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package loopdev

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestAttachments has one device get another file, as when a volume ends and the next one gets its device. What was seen
// of the first attachment is not taken for the second.
func TestAttachments(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	first, second := image(t, filepath.Join(dir, "first")), image(t, filepath.Join(dir, "second"))
	d := attach(t, new(Allocator), first, Options{})
	behind := func(f *os.File) Attachment {
		t.Helper()
		all, err := Attachments()
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(a Attachment) bool { return a.Index == d.Index() })
		if i < 0 {
			t.Fatalf("%s is not among %+v", d.Path(), all)
		}
		if is, err := inodeOf(f); err != nil || (inode{all[i].Device, all[i].Inode}) != is {
			t.Errorf("behind %s is %+v, expected %+v: %v", d.Path(), all[i], is, err)
		}
		return all[i]
	}
	before := behind(first)
	if again := behind(first); again != before || before.Number == 0 {
		t.Errorf("%+v, and then %+v", before, again)
	}
	if _, err := d.File().ReadAt(make([]byte, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if s, err := before.Stats(); err != nil || s.Reads == 0 || s.ReadBytes < BlockSize {
		t.Errorf("it did %+v, %v", s, err)
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
	if _, err := before.Stats(); !errors.Is(err, ErrNotAttached) {
		t.Errorf("a device that is free: %v", err)
	}
	only := Allocator{nodes: 1000, free: []int{d.Index()}} // it knows no other device
	if d2 := attach(t, &only, second, Options{}); d2.Index() != d.Index() {
		t.Fatalf("%s has the other file", d2.Path())
	}
	after := behind(second)
	if after.Number == before.Number {
		t.Errorf("both attachments have the number %d", after.Number)
	}
	if _, err := before.Stats(); !errors.Is(err, ErrNotAttached) {
		t.Errorf("the first attachment: %v", err)
	}
}
