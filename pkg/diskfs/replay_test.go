// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package diskfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// live returns a clone of a mounted image in which the file "file" was just fsynced.
func live(t *testing.T, fs *Filesystem, path string) string {
	dir, umount := mounted(t, fs, path)
	defer umount()
	put(t, dir, "before", "1")
	run(t, "sync", "-f", dir)
	put(t, dir, "file", "synced")
	return clone(t, path)
}

func TestUnclean(t *testing.T) {
	const size = 1 * gib
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			fs := lookup(t, name)
			template := format(t, fs, size, "", nil)
			image := live(t, fs, template)
			if _, err := fs.Verify(open(t, image), size, ""); !errors.Is(err, ErrCorrupt) || !errors.Is(err, ErrUnclean) {
				t.Fatalf("Verify: %v, want ErrCorrupt and ErrUnclean", err)
			} else {
				t.Log(err)
			}
			err := fs.NewIdentity(open(t, image), open(t, image), uuid.New())
			if name == "btrfs" { // its log is replayed whatever the UUID
				must(t, err)
			} else {
				if !errors.Is(err, ErrUnclean) {
					t.Fatalf("NewIdentity: %v, want ErrUnclean", err)
				}
				t.Log(err)
				_, umount := mounted(t, fs, image, fs.MountData...)
				umount() // as the error says
				rename(t, fs, image, image)
			}
			dir, umount := mounted(t, fs, image)
			contains(t, dir, "file", "synced")
			umount()
			is(t, fs, image, size, "", identify(t, fs, image))
		})
	}
}

// TestFrozen clones a frozen filesystem. FIFREEZE leaves ext4 and btrfs with nothing to replay, and
// xfs with a log that is dirty on purpose (xfs_fs_freeze).
func TestFrozen(t *testing.T) {
	for _, name := range Names() {
		fs := lookup(t, name)
		template := format(t, fs, gib, "", nil)
		dir, umount := mounted(t, fs, template)
		put(t, dir, "file", "synced")
		run(t, "fsfreeze", "-f", dir)
		thaw := func() { run(t, "fsfreeze", "-u", dir) }
		image := func() string { defer thaw(); return clone(t, template) }()
		umount()
		err := fs.NewIdentity(open(t, image), open(t, image), uuid.New())
		if name == "xfs" {
			if !errors.Is(err, ErrUnclean) {
				t.Errorf("%s: %v, want ErrUnclean", name, err)
			}
			continue
		}
		must(t, err)
		is(t, fs, image, gib, "", identify(t, fs, image))
	}
}

// TestCrashAfterNewIdentity crashes a clone after its new identity. The kernel replays a journal that
// it began after the changed record.
func TestCrashAfterNewIdentity(t *testing.T) {
	const size = 1 * gib
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			fs := lookup(t, name)
			template := format(t, fs, size, "", nil)
			coexist(t, fs, template) // used once
			image := clone(t, template)
			id := rename(t, fs, template, image)
			crashed := live(t, fs, image)
			dir, umount := mounted(t, fs, crashed)
			contains(t, dir, "file", "synced")
			umount()
			is(t, fs, crashed, size, "", id)
		})
	}
}

// TestExt4ReplayRestoresUUID shows why NewIdentity refuses an ext4 whose journal waits for replay: the
// replay brings the old UUID back.
func TestExt4ReplayRestoresUUID(t *testing.T) {
	template := format(t, &ext4, gib, "", nil)
	dir, umount := mounted(t, &ext4, template)
	put(t, dir, "orphan", "x")
	f, err := os.Open(filepath.Join(dir, "orphan"))
	must(t, err)
	must(t, os.Remove(f.Name())) // s_last_orphan: the superblock goes through the journal
	put(t, dir, "file", "synced")
	image := clone(t, template)
	must(t, f.Close())
	umount()
	id := uuid.New()
	img := open(t, image)
	must(t, renameExt4(img, img, 0, ext4SuperAt, id))
	_, umount = mounted(t, &ext4, image)
	umount()
	if got := identify(t, &ext4, image); got == id {
		t.Errorf("the new UUID survived the replay: NewIdentity need not refuse such an image")
	}
}

// TestXFSLogHead fills a log of 16 MiB many times, so that its head is in many places.
func TestXFSLogHead(t *testing.T) {
	const size = 300 * MiB
	path := format(t, &xfs, size, "", nil, "--unsupported", "-l", "size=16m")
	seen := map[int64]bool{}
	wraps, last := 0, int64(0)
	for round := range 40 {
		dir, umount := mounted(t, &xfs, path)
		for i := range 2000 {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d-%s", i, strings.Repeat("x", 200))), nil, os.FileMode(0o600+round%8)))
		}
		run(t, "sync", "-f", dir)
		must(t, exec.Command("find", dir, "-type", "f", "-delete").Run())
		umount()
		f := open(t, path)
		if _, err := xfs.Verify(f, size, ""); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		s, err := readXFS(f, 0)
		must(t, err)
		at, err := s.unmountRecord(f)
		must(t, err)
		seen[at] = true
		if at < last {
			wraps++
		}
		last = at
		if round%5 == 0 {
			is(t, &xfs, path, size, "", rename(t, &xfs, path, path))
		}
	}
	t.Logf("%d places, %d wraps", len(seen), wraps)
	if wraps == 0 {
		t.Error("the log never wrapped: do more")
	}
}
