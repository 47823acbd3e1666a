// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestSoiledDevice attaches a claim to a device that somebody has left read-only, in a mode
// in which the kernel drops flushes, and with a low limit of discards.
func TestSoiledDevice(t *testing.T) {
	everywhere(t, gib, func(n *node, filesystem string) {
		size := int64(64 * mib)
		if filesystem != "ext4" {
			size = 320 * mib
		}
		v := n.mustCreate(claim("claim", filesystem, size))
		index := n.onSoiled(v)
		n.mustBeClean(index)
		target := n.mustPublishClaim(v, "pod")
		f, err := os.Create(filepath.Join(target, "file"))
		if err != nil {
			n.t.Fatal(err)
		}
		_, err = f.Write([]byte("kept"))
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			n.t.Error(err)
		}
		n.mustEnd(v, "pod")
	})
	t.Run("block", func(t *testing.T) {
		n := newNode(t, testenv.XFS, gib)
		v := n.mustCreate(disk("block", 8*mib))
		index := n.onSoiled(v)
		n.mustBeClean(index)
		f := openDisk(t, n.mustPublishClaim(v, "pod"), v.Mode, os.O_RDWR)
		_, err := f.WriteAt(make([]byte, mib), 0)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			t.Error(err)
		}
		n.mustEnd(v, "pod")
	})
}

// onSoiled stages a claim on a device that was soiled, and returns its index.
//
// A plugin that has just started takes the device that another took before it, since both
// see the free devices in the order in which the kernel lists them. Programs that run now
// may be faster, so it is tried several times.
func (n *node) onSoiled(v image.Record) int {
	n.t.Helper()
	probe := n.mustCreate(disk("probe", 8*mib))
	defer n.mustDelete(probe.ID)
	for range 20 {
		n.forgetDevices()
		n.mustStage(probe)
		soiled := n.loops(probe.ID)[0]
		soil(n.t, soiled)
		n.mustUnstage(probe.ID)
		n.forgetDevices()
		n.mustStage(v)
		if loops := n.loops(v.ID); len(loops) == 1 && loops[0] == soiled {
			return soiled
		}
		n.mustUnstage(v.ID)
	}
	n.t.Fatal("the claim never got the device that was soiled")
	return 0
}

// forgetDevices makes the node forget which devices are free, as a new process.
func (n *node) forgetDevices() {
	d := device.New(n.pool, n.images)
	n.devices, n.mounts.devices, n.growth.mounts.devices, n.copies.devices = d, d, d, d
}

// soil leaves bad state on a device and detaches it, with nothing but the kernel's calls.
func soil(t testing.TB, index int) {
	t.Helper()
	d, err := loopdev.Open(index)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	fd := int(d.File().Fd())
	err = errors.Join(
		os.WriteFile(queue(index, "write_cache"), []byte("write through"), 0),
		os.WriteFile(queue(index, "discard_max_bytes"), []byte("65536"), 0),
		unix.IoctlSetPointerInt(fd, unix.BLKROSET, 1),
	)
	if err == nil {
		_, err = unix.IoctlRetInt(fd, unix.LOOP_CLR_FD)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// mustBeClean checks that nothing of soil is left.
func (n *node) mustBeClean(index int) {
	n.t.Helper()
	for name, want := range map[string]string{
		"../ro":             "0",
		"write_cache":       "write back",
		"discard_max_bytes": fmt.Sprint(4*gib - 4096), // the largest limit that the kernel takes
	} {
		if got := queueSays(n.t, index, name); got != want {
			n.t.Errorf("loop%d: %s is %s, want %s", index, name, got, want)
		}
	}
}

func queue(index int, name string) string {
	return fmt.Sprintf("/sys/block/loop%d/queue/%s", index, name)
}

func queueSays(t testing.TB, index int, name string) string {
	t.Helper()
	text, err := os.ReadFile(queue(index, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// TestAttachedBefore: a plugin died when it had attached a thick claim, and before it had
// made the device refuse discards; and then somebody made the device drop flushes.
func TestAttachedBefore(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	for _, r := range []ClaimRequest{disk("block", 8*mib), claim("filesystem", "ext4", 64*mib)} {
		t.Run(string(r.Mode), func(t *testing.T) {
			n := n.with(t)
			r.Provisioning = image.Thick
			v := n.mustCreate(r)
			img, err := n.images.Open(v.ID)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			left, err := new(loopdev.Allocator).Attach(img.File, loopdev.Options{Name: v.ID, AutoClear: r.Mode == image.ModeFilesystem})
			if err != nil {
				t.Fatal(err)
			}
			defer left.Close()
			if err := os.WriteFile(queue(left.Index(), "write_cache"), []byte("write through"), 0); err != nil {
				t.Fatal(err)
			}
			n.mustStage(v)
			if loops := n.loops(v.ID); len(loops) != 1 || loops[0] != left.Index() {
				t.Errorf("the claim is on %v, and was on %d", loops, left.Index())
			}
			for name, want := range map[string]string{"write_cache": "write back", "discard_max_bytes": "0"} {
				if got := queueSays(t, left.Index(), name); got != want {
					t.Errorf("%s is %s, want %s", name, got, want)
				}
			}
			left.Close()
			img.Close()
			n.mustUnstage(v.ID)
			n.mustDelete(v.ID)
		})
	}
}

// TestReaderCannotExchange: a pod that reads a block volume, and has no CAP_SYS_ADMIN, can
// neither write to its device, nor make it writable, nor exchange the file behind it.
func TestReaderCannotExchange(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(disk("block", 8*mib))
	r := n.publishRequest(v, "reader")
	r.TargetReadOnly = true
	if err := n.PublishClaim(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	loops := n.loops(v.ID)
	own, err := os.Create(filepath.Join(testenv.Dir(t), "own"))
	if err == nil {
		err = own.Truncate(8 * mib)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	whole := [2]uint64{0, 8 * mib}
	for name, flags := range map[string]int{"open for reading": unix.O_RDONLY, "open for writing": unix.O_RDWR} {
		t.Run(name, func(t *testing.T) {
			asPod(t, func() {
				fd, err := unix.Open(r.Target, flags|unix.O_CLOEXEC, 0)
				if err != nil {
					t.Error(err)
					return
				}
				defer unix.Close(fd)
				_, err = unix.Pwrite(fd, make([]byte, 4096), 0)
				want := unix.EPERM
				if flags == unix.O_RDONLY {
					want = unix.EBADF
				}
				if !errors.Is(err, want) {
					t.Errorf("a write: %v", err)
				}
				if _, err := unix.IoctlRetInt(fd, loopChangeFD); err == nil {
					t.Error("LOOP_CHANGE_FD without a file")
				}
				if err := unix.IoctlSetInt(fd, loopChangeFD, int(own.Fd())); !errors.Is(err, unix.EINVAL) {
					t.Errorf("LOOP_CHANGE_FD: %v", err)
				}
				if err := unix.IoctlSetPointerInt(fd, unix.BLKROSET, 0); !errors.Is(err, unix.EACCES) {
					t.Errorf("BLKROSET: %v", err)
				}
				for name, request := range map[string]uintptr{"BLKDISCARD": unix.BLKDISCARD, "BLKZEROOUT": unix.BLKZEROOUT} {
					if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&whole))); e == 0 {
						t.Errorf("%s of a reader's device succeeded", name)
					}
				}
				if _, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
					t.Error("a reader mapped its device for writing")
				}
			})
			if is := n.loops(v.ID); !slices.Equal(is, loops) {
				t.Errorf("the claim was on the devices %v, and is on %v now", loops, is)
			}
		})
	}
	writer := n.mustPublishClaim(v, "writer")
	f := openDisk(t, writer, v.Mode, os.O_RDWR)
	_, err = f.WriteAt(make([]byte, 4096), 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Errorf("a writer beside the reader: %v", err)
	}
	if err := n.PublishClaim(t.Context(), r); err != nil {
		t.Errorf("publishing to the reader again: %v", err)
	}
	if is := n.loops(v.ID); !slices.Equal(is, loops) || len(loops) != 2 {
		t.Errorf("a reader and a writer are on the devices %v, and were on %v", is, loops)
	}
	n.mustEnd(v, "reader", "writer")
	for _, index := range loops {
		if queueSays(t, index, "../ro") != "0" {
			t.Errorf("loop%d is left read-only to the next program", index)
		}
	}
}

const loopChangeFD = 0x4C06 // LOOP_CHANGE_FD in include/uapi/linux/loop.h

// asPod runs something without CAP_SYS_ADMIN, as root of a container does.
func asPod(t *testing.T, run func()) {
	t.Helper()
	testenv.OnThread(func() {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := unix.Capget(&header, &caps[0])
		caps[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		caps[0].Permitted &^= 1 << unix.CAP_SYS_ADMIN
		if err == nil {
			err = unix.Capset(&header, &caps[0])
		}
		if err != nil {
			t.Error(err)
			return
		}
		run()
	})
}
