// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// attach attaches a file to a loop device as the plugin does: with blocks of 4 KiB, with direct I/O, and until its last
// user goes. name is how the device is found again after a crash, see [detachBelow].
func attach(loop *os.File, file *os.File, name string) error {
	c := unix.LoopConfig{Fd: uint32(file.Fd()), Size: 4096}
	c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(c.Info.File_name[:unix.LO_NAME_SIZE-1], name)
	return os.NewSyscallError("LOOP_CONFIGURE", unix.IoctlLoopConfigure(int(loop.Fd()), &c))
}

func loopPath(index int) string { return "/dev/loop" + strconv.Itoa(index) }

// attached reports whether a device has a file.
func attached(index int) bool {
	return unix.Access("/sys/block/loop"+strconv.Itoa(index)+"/loop", unix.F_OK) == nil
}

// control makes an ioctl on the loop driver: LOOP_CTL_ADD, or LOOP_CTL_REMOVE of loop(4).
func control(request uint, arg int) (int, error) {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	index, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg))
	if e != 0 {
		return 0, e
	}
	return int(index), nil
}

// indices are loop devices that this program made. Each is one volume's at a time, so that volumes that are made at once
// do not race for what LOOP_CTL_GET_FREE returns to all of them.
type indices struct {
	mu   sync.Mutex
	free []int
	made []int
}

// take returns a device that nobody else has taken meanwhile: to other programs it is a free device like any other.
func (x *indices) take() (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, index := range x.free {
		if !attached(index) {
			x.free = append(x.free[:i], x.free[i+1:]...)
			return index, nil
		}
	}
	index, err := control(unix.LOOP_CTL_ADD, -1)
	if err != nil {
		return 0, fmt.Errorf("LOOP_CTL_ADD: %w", err)
	}
	x.made = append(x.made, index)
	return index, nil
}

func (x *indices) put(index int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.free = append(x.free, index)
}

// remove removes devices, of which it leaves those that somebody has. One takes the kernel 44 ms, most of which it waits.
func remove(devices []int) {
	work := make(chan int)
	var g sync.WaitGroup
	for range 32 {
		g.Go(func() {
			for index := range work {
				control(unix.LOOP_CTL_REMOVE, index) // EBUSY: somebody has it
			}
		})
	}
	for _, index := range devices {
		work <- index
	}
	close(work)
	g.Wait()
}

// existing lists the loop devices that there are, attached or not.
func existing() (map[int]bool, error) {
	names, err := filepath.Glob("/sys/block/loop*")
	have := map[int]bool{}
	for _, name := range names {
		if index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(name), "loop")); err == nil {
			have[index] = true
		}
	}
	return have, err
}

// detachBelow detaches the devices whose name, as the program set it that attached them, is a path in a directory. It
// returns how many there were.
func detachBelow(dir string) (found int, err error) {
	names, err := filepath.Glob("/sys/block/loop*/loop")
	for _, name := range names {
		f, e := os.Open(filepath.Join("/dev", strings.Split(name, "/")[3]))
		if e != nil {
			continue // it went meanwhile
		}
		info, e := unix.IoctlLoopGetStatus64(int(f.Fd()))
		if e == nil && strings.HasPrefix(unix.ByteSliceToString(info.File_name[:]), dir+"/") {
			found++
			if _, e := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD); e != nil && !errors.Is(e, unix.ENXIO) {
				err = errors.Join(err, fmt.Errorf("LOOP_CLR_FD %s: %w", f.Name(), e))
			}
		}
		f.Close()
	}
	return found, err
}
