// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/flock"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestCleanAllCommand removes templates, but not one whose lock somebody holds.
func TestCleanAllCommand(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 512<<20), "pool")
			clean := func(want string) {
				t.Helper()
				if code, out := testenv.Product(t, "clean-all", "--pool", dir); code != 0 || out != want+"\n" {
					t.Errorf("exit code %d, %q; not %q", code, out, want)
				}
			}
			open(t, pool.Config{Dir: dir})
			clean("0 templates removed, 0 left because they are being built")
			const a, b, c = "btrfs-128m-000000000000000a", "ext4-64m-000000000000000b", "xfs-300m-000000000000000c"
			const notOurs = "notes.txt"
			for _, name := range []string{"templates/" + a, "templates/" + b, "templates/" + c, "templates/" + notOurs, "volumes/v", "cache/k"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			lock, err := flock.TryLock(filepath.Join(dir, "locks", b+".lock"))
			if err != nil {
				t.Fatal(err)
			}
			defer lock.Close()
			clean("2 templates removed, 1 left because they are being built")
			if got := names(t, filepath.Join(dir, "templates")); !slices.Equal(got, []string{b, notOurs}) {
				t.Errorf("templates %v", got)
			}
			clean("0 templates removed, 1 left because they are being built")
			if err := lock.Close(); err != nil {
				t.Fatal(err)
			}
			clean("1 templates removed, 0 left because they are being built")
			clean("0 templates removed, 0 left because they are being built")
			for _, d := range []struct {
				name string
				want []string
			}{{"templates", []string{notOurs}}, {"locks", []string{a + ".lock", b + ".lock", c + ".lock"}}, {"volumes", []string{"v"}}, {"cache", []string{"k"}}} {
				if got := names(t, filepath.Join(dir, d.name)); !slices.Equal(got, d.want) {
					t.Errorf("%s: %v", d.name, got)
				}
			}
		})
	}
}

// open makes a pool.
func open(t *testing.T, c pool.Config) {
	t.Helper()
	p, err := pool.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
}

func TestCleanAllOfLoopbackPool(t *testing.T) {
	dir := filepath.Join(testenv.Ext4.Mount(t, 512<<20), "pool")
	open(t, pool.Config{Dir: dir, LoopbackSize: 400 << 20})
	mounted := true
	t.Cleanup(func() {
		if mounted {
			testenv.Run(t, "umount", filepath.Join(dir, "mnt"))
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "mnt", "templates", "ext4-64m-000000000000000a"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, removed := range []int{1, 0} {
		if code, out := testenv.Product(t, "clean-all", "--pool", dir); code != 0 || out != fmt.Sprintf("%d templates removed, 0 left because they are being built\n", removed) {
			t.Errorf("exit code %d, not %d removed: %s", code, removed, out)
		}
	}
	testenv.Run(t, "umount", filepath.Join(dir, "mnt"))
	mounted = false
	fails(t, []string{"clean-all", "--pool", dir}, dir, "not mounted")
}

// TestCleanAllWithoutPool gives the command paths that are not a pool. It must not make one.
func TestCleanAllWithoutPool(t *testing.T) {
	fs := testenv.XFS.Mount(t, 512<<20)
	if err := os.WriteFile(filepath.Join(fs, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{fs, filepath.Join(fs, "missing"), filepath.Join(fs, "file")} {
		fails(t, []string{"clean-all", "--pool", dir}, dir, "no pool", "--pool")
	}
	fails(t, []string{"clean-all"}, "--pool")
	if got := names(t, fs); !slices.Equal(got, []string{"file"}) {
		t.Errorf("made %v", got)
	}
}
