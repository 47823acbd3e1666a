// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package pool

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
)

// TestGateRefusesLargeBlocks: a volume's blocks have 4 KiB, and a write to a shared extent
// takes a whole block of the pool. Such a pool formats templates, and mounts no volume.
func TestGateRefusesLargeBlocks(t *testing.T) {
	for blocks, words := range map[string]string{"16384": "16Ki", "8192": "8Ki"} {
		t.Run(blocks, func(t *testing.T) {
			dir := filepath.Join(testenv.Mount(t, 900<<20, "mkfs.xfs", "-q", "-s", "size=4096", "-b", "size="+blocks), "pool")
			_, err := Open(t.Context(), Config{Dir: dir})
			if !errors.Is(err, ErrUnusable) {
				t.Fatalf("got %v, want ErrUnusable", err)
			}
			t.Log(err)
			for _, w := range []string{dir, "blocks of " + words, "mkfs.xfs -b size=4096", "--loopback-pool-size"} {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the message lacks %q", w)
				}
			}
			mustBeEmpty(t, dir)
			// The advice holds.
			p := loopback(t, dir, 400<<20)
			p.Close()
			testenv.Umount(t, p.Root())
		})
	}
}

// mustBeEmpty checks that a directory has no files and no loop devices.
func mustBeEmpty(t *testing.T, dir string) {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("Open left %v: %v", entries, err)
	}
	testenv.NoLoopsBelow(t, dir)
}

// TestGateAccepts opens pools on filesystems that hold volumes, though they are unusual.
func TestGateAccepts(t *testing.T) {
	for name, mkfs := range map[string][]string{
		"xfs, blocks of 1 KiB":           {"mkfs.xfs", "-q", "-b", "size=1024", "-m", "reflink=1"},
		"xfs, blocks of 2 KiB":           {"mkfs.xfs", "-q", "-b", "size=2048", "-m", "reflink=1"},
		"xfs, sectors of 512 bytes":      {"mkfs.xfs", "-q", "-s", "size=512", "-m", "reflink=1"},
		"btrfs, nodes of 4 KiB":          {"mkfs.btrfs", "-q", "-n", "4096"},
		"btrfs, nodes of 64 KiB":         {"mkfs.btrfs", "-q", "-n", "65536"},
		"btrfs, data and metadata mixed": {"mkfs.btrfs", "-q", "--mixed", "-n", "4096"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(testenv.Mount(t, 400<<20, mkfs...), "pool")
			mustOpen(t, Config{Dir: dir})
			testenv.NoLoopsBelow(t, dir)
		})
	}
}

// TestTrialLeavesNothing: the trial volume has no name and, a moment later, no device.
func TestTrialLeavesNothing(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Mount(t, 400<<20)
			before, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := tryVolume(dir); err != nil {
				t.Fatal(err)
			}
			if after, err := os.ReadDir(dir); err != nil || len(after) != len(before) {
				t.Errorf("the directory had %v and has %v: %v", before, after, err)
			}
			testenv.NoLoopsBelow(t, dir)
		})
	}
}

// TestOpenNearlyFull: a pool opens wherever in the trial its space runs out.
func TestOpenNearlyFull(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 400<<20), "pool")
			mustOpen(t, Config{Dir: dir})
			testenv.Fill(t, dir)
			filler := filepath.Join(dir, "filler")
			for range 48 {
				fi, err := os.Stat(filler)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(filler, fi.Size()-4096); err != nil {
					t.Fatal(err)
				}
				p, err := Open(t.Context(), Config{Dir: dir})
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(p.Sync(), p.Close()); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestTrialOnFullPool: the space may run out at any moment of the trial.
func TestTrialOnFullPool(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Mount(t, 400<<20)
			trial, err := trialVolume(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer trial.Close()
			testenv.Fill(t, dir)
			err = useTrial(trial)
			if err == nil && kind.Name == "xfs" { // it keeps some blocks back
				return
			}
			t.Log(err)
			if got := judgeTrial(dir, trial, err); !errors.Is(got, ErrFull) || errors.Is(got, ErrUnusable) {
				t.Errorf("got %v, want ErrFull", got)
			}
		})
	}
}

// TestGateInOwnDev opens a pool where /dev is a tmpfs in which there is no loop device.
func TestGateInOwnDev(t *testing.T) {
	dir := testenv.XFS.Mount(t, 400<<20)
	trial, err := trialVolume(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer trial.Close()
	testenv.InOwnDev(t, func() {
		if err := useTrial(trial); err != nil {
			t.Error(err)
		}
	})
	if found, err := loopdev.Find(trial); err != nil || len(found) > 0 {
		t.Errorf("the trial volume stayed attached to %v: %v", found, err)
	}
}

// BenchmarkTryVolume is what the trial costs at each start.
func BenchmarkTryVolume(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		dir := kind.Pool(b)
		b.Run(kind.Name, func(b *testing.B) {
			for b.Loop() {
				if err := tryVolume(dir); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
