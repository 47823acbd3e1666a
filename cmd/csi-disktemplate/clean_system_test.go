// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/flock"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestCleanAllCommand removes templates, but not one whose lock somebody holds.
func TestCleanAllCommand(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 512<<20), "pool")
			clean := func(last string, flags ...string) (all string) {
				t.Helper()
				code, out := testenv.Product(t, append([]string{"clean-all", "--pool", dir}, flags...)...)
				if code != 0 || !strings.HasSuffix("\n"+out, "\n"+last+"\n") {
					t.Errorf("exit code %d, %q; not %q at the end", code, out, last)
				}
				return out
			}
			has := func(out string, line ...string) {
				t.Helper()
				if !regexp.MustCompile(`(?m)^` + strings.Join(line, " +") + `$`).MatchString(out) {
					t.Errorf("no line is %q", line)
				}
			}
			open(t, pool.Config{Dir: dir})
			clean("There are no templates.")
			const a, b, c = "btrfs-128m-000000000000000a", "ext4-64m-000000000000000b", "xfs-300m-000000000000000c"
			const notOurs = "notes.txt"
			for name, size := range map[string]int{"templates/" + a: 16 << 10, "templates/" + b: 8 << 10, "templates/" + c: 64 << 10, "templates/" + notOurs: 9, "volumes/v": 9, "cache/k": 9} {
				if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			lock, err := flock.TryLock(filepath.Join(dir, "locks", b+".lock"))
			if err != nil {
				t.Fatal(err)
			}
			defer lock.Close()
			if err := os.Chtimes(filepath.Join(dir, "locks", b+".lock"), time.Time{}, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)); err != nil {
				t.Fatal(err)
			}
			if out, err := testenv.Try("cp", "--reflink=always", filepath.Join(dir, "templates", c), filepath.Join(dir, "volumes", "clone")); err != nil {
				t.Fatal(err, out)
			}
			const at = `2026-01-02 03:04:05Z`
			out := clean("Templates: 3, which take 88Ki; 2 to be removed, which frees 16Ki.", "--dry-run")
			has(out, "ACTION", "TEMPLATE", "FILESYSTEM", "SIZE", "TAKES", "FREES", "LAST USED", "RESULT", "REASON")
			has(out, "delete", a, "btrfs", "128Mi", "16Ki", "16Ki", "-", "-", "no process builds or replaces it")
			has(out, "leave", b, "ext4", "64Mi", "8Ki", "0 bytes", at, "-", fmt.Sprintf("it is locked, as while it is built, by pid=%d .*", os.Getpid()))
			has(out, "delete", c, "xfs", "300Mi", "64Ki", "0 bytes", "-", "-", "no process builds or replaces it; volumes keep the 64Ki that they share with it")
			out = clean("Templates: 3, which take 88Ki; 2 to be removed, which frees 16Ki.", "--dry-run", "-o", "wide")
			has(out, "ACTION.*REASON", "PATH")
			has(out, "delete", a, ".*", filepath.Join(dir, "templates", a))
			clean("takesBytes: 90112", "--dry-run", "-o", "yaml")
			if got := names(t, filepath.Join(dir, "locks")); !slices.Equal(got, []string{b + ".lock"}) {
				t.Errorf("a dry run made %v", got)
			}
			out = clean("Templates: 3, which take 88Ki; 2 removed, which freed 16Ki.")
			has(out, "delete", a, ".*", "done", ".*")
			has(out, "leave", b, ".*", "-", "it is locked.*")
			if got := names(t, filepath.Join(dir, "templates")); !slices.Equal(got, []string{b, notOurs}) {
				t.Errorf("templates %v", got)
			}
			clean("Templates: 1, which take 8Ki; 0 removed, which freed 0 bytes.")
			if err := lock.Close(); err != nil {
				t.Fatal(err)
			}
			clean("Templates: 1, which take 8Ki; 1 removed, which freed 8Ki.")
			clean("There are no templates.")
			for _, d := range []struct {
				name string
				want []string
			}{{"templates", []string{notOurs}}, {"locks", []string{a + ".lock", b + ".lock", c + ".lock"}}, {"volumes", []string{"clone", "v"}}, {"cache", []string{"k"}}} {
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

// TestCleanAllWithoutPool gives the command paths that are not a pool. It must not make one.
func TestCleanAllWithoutPool(t *testing.T) {
	fs := testenv.XFS.Mount(t, 512<<20)
	if err := os.WriteFile(filepath.Join(fs, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{fs, filepath.Join(fs, "missing"), filepath.Join(fs, "file")} {
		fails(t, []string{"clean-all", "--pool", dir}, dir, "no pool", "--pool")
	}
	fails(t, []string{"clean-all", "--pool", ""}, "--pool")
	if got := names(t, fs); !slices.Equal(got, []string{"file"}) {
		t.Errorf("made %v", got)
	}
}
