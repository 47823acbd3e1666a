//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
		within  func(*testing.T, func())
		says    string
	}{
		"not open for writing": {readOnly, here, "not open for writing"},
		"a directory":          {directory, here, "LOOP_CONFIGURE"},
		"a /dev of one's own":  {f, withOwnDev, "mount the host's /dev"},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := existing()
			if err != nil {
				t.Fatal(err)
			}
			const times = 32
			try.within(t, func() {
				for range times {
					d, err := new(Allocator).Attach(try.backing, Options{NoDiscard: true})
					if err == nil || !strings.Contains(err.Error(), try.says) {
						t.Errorf("%v, want an error with %q", err, try.says)
					}
					if err == nil {
						d.Detach()
					}
				}
			})
			after, err := existing()
			if err != nil {
				t.Fatal(err)
			}
			// Other tests run now, and make devices.
			if more := len(after) - len(before); more >= times/2 {
				t.Errorf("%d attempts to attach left %d devices", times, more)
			}
			if found, err := Find(try.backing); err != nil || len(found) > 0 {
				t.Errorf("the file is attached to %v: %v", found, err)
			}
		})
	}
}

func here(_ *testing.T, run func()) { run() }

// withOwnDev runs something where /dev is a tmpfs, as it is in the nodes of kind and
// minikube: the nodes of new devices do not appear there.
func withOwnDev(t *testing.T, run func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its mount namespace
		err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = testenv.DropOthersHere()
		}
		if err == nil {
			err = unix.Mount("tmpfs", "/dev", "tmpfs", 0, "")
		}
		if err == nil {
			err = unix.Mknod("/dev/loop-control", unix.S_IFCHR|0o600, int(unix.Mkdev(10, 237)))
		}
		if err != nil {
			t.Error(err)
			return
		}
		run()
	}()
	<-done
}
