// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package disktest gives each test a freshly formatted disk of its own.
//
// A test of a program that writes files, in the file shop_test.go of any module:
//
//	package shop
//
//	import (
//		"os"
//		"path/filepath"
//		"testing"
//
//		"github.com/csi-disktemplate/csi-disktemplate/pkg/disktest"
//	)
//
//	func TestFullDisk(t *testing.T) {
//		dir := disktest.Mounted(t, disktest.Options{Filesystem: "ext4", Size: 16 << 20})
//		err := os.WriteFile(filepath.Join(dir, "order"), make([]byte, 32<<20), 0o600)
//		if err == nil {
//			t.Error("32 MiB fit on a disk of 16 MiB")
//		}
//	}
//
// The first disk of a kind is formatted in a VM, which takes seconds, and kept as a template in a
// cache directory. All others, also those of later runs, are clones of it, or sparse copies where
// the cache's filesystem cannot share extents: btrfs and xfs can. Tests may run in parallel, in
// any number of processes.
//
// [Mounted] and [Device] need root, [File] does not. A test that cannot have its disk fails, and
// says what is missing; it is never skipped. The machine needs what `csi-disktemplate format`
// needs: QEMU, a kernel in /boot, and the filesystem's programs.
//
// A disk is gone after its test. Nothing on it outlives the machine: a sync on a mounted disk or
// a device costs nothing. If a test process is killed, a mounted disk and a device stay until
// they are unmounted, or detached with losetup.
//
// Caveat: this package has an init function. It makes the test's binary serve as /init of the VM,
// which is a copy of it: there the function never returns. Functions init of packages that are
// initialized before it run in the VM too.
package disktest
