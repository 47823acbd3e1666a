// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/lease"
)

// The kernel tells a device's file, and not a file's devices. To ask all devices takes 30 µs
// for each that is attached. Two things make that rare:
//
//   - A lease proves that no device has a file: see alone.
//   - What this process saw behind a device it remembers, and asks that device first.

// Find returns the indices of all devices that have the file, whoever attached them. It
// compares inodes, so the file's name does not matter. Devices may come and go meanwhile: the
// answer stays true only if the caller keeps others from attaching and detaching the file.
func Find(backing *os.File) ([]int, error) {
	if alone(backing) {
		return nil, nil
	}
	nodes, err := Attached()
	if err != nil {
		return nil, err
	}
	var found []int
	for _, i := range nodes {
		ok, err := backs(i, backing)
		if errors.Is(err, ErrNotAttached) {
			// It is free, or being detached, which cannot happen while somebody has it open.
			continue
		}
		if err != nil && attached(i) {
			// This device may have the file. If Find left it out, the caller would attach the
			// file a second time, which makes two filesystems on one disk.
			return nil, err
		}
		if ok {
			found = append(found, i)
		}
	}
	seen.setComplete()
	return found, nil
}

// Known is [Find] for a caller that harms nothing if a device is missing that another program
// attached to the file while this process ran. It finds all that were attached before, and
// those that this process attached.
func Known(backing *os.File) ([]int, error) {
	is, err := inodeOf(backing)
	if err != nil {
		return nil, err
	}
	var found []int
	for _, i := range seen.devicesOf(is) {
		if ok, err := backs(i, backing); err == nil && ok {
			found = append(found, i)
		}
	}
	if len(found) > 0 && seen.isComplete() {
		return found, nil
	}
	return Find(backing)
}

// OpenBacked opens a device that has the file, or returns [ErrNotAttached]. It compares
// the inode after it has opened the device, since before that the device could have become
// another file's.
func OpenBacked(backing *os.File) (*Device, error) {
	is, err := inodeOf(backing)
	if err != nil {
		return nil, err
	}
	if d, err := openAny(seen.devicesOf(is), backing); err != nil || d != nil {
		return d, err
	}
	indices, err := Find(backing)
	if err != nil {
		return nil, err
	}
	d, err := openAny(indices, backing)
	if err == nil && d == nil {
		err = fmt.Errorf("%w: no loop device has %s", ErrNotAttached, backing.Name())
	}
	return d, err
}

// openAny opens the first of the devices that has the file, or returns nil.
func openAny(indices []int, backing *os.File) (*Device, error) {
	for _, i := range indices {
		d, err := Open(i)
		if errors.Is(err, ErrNotAttached) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if ok, err := d.Backs(backing); err == nil && ok {
			return d, nil
		}
		d.Close()
	}
	return nil, nil
}

// alone reports whether nobody but f has its file open: see [lease.Sole]. That proves that no loop
// device has the file, in whatever namespace, because a device keeps its file open. If it is false,
// nothing is proven. What counts are open file descriptions, so a device must never get the
// description that is asked later: see [Device.configure].
func alone(f *os.File) bool { return lease.Sole(f) == nil }

// sights are the files that this process saw behind loop devices. Any of them may be gone by
// now, so each is asked for again. There are at most as many as there are devices.
type sights struct {
	mu       sync.Mutex
	files    map[int]inode
	devices  map[inode][]int
	complete bool // all that were attached at one moment were seen
	// lent are the devices that an Allocator attached and that will detach themselves.
	lent map[int]*Allocator
}

var seen = sights{files: map[int]inode{}, devices: map[inode][]int{}, lent: map[int]*Allocator{}}

func (s *sights) set(index int, f inode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[index] == f {
		return
	}
	s.drop(index)
	s.files[index] = f
	s.devices[f] = append(s.devices[f], index)
}

// forget notes that a device has no file. One that was lent goes back to its Allocator.
func (s *sights) forget(index int) {
	s.mu.Lock()
	from := s.lent[index]
	s.drop(index)
	s.mu.Unlock()
	if from != nil {
		from.giveBack(index)
	}
}

// lend notes that a device will detach itself, or with nil that it will not.
func (s *sights) lend(index int, from *Allocator) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if from == nil {
		delete(s.lent, index)
	} else {
		s.lent[index] = from
	}
}

func (s *sights) drop(index int) {
	f, known := s.files[index]
	if !known {
		return
	}
	delete(s.files, index)
	delete(s.lent, index)
	s.devices[f] = slices.DeleteFunc(s.devices[f], func(i int) bool { return i == index })
	if len(s.devices[f]) == 0 {
		delete(s.devices, f)
	}
}

func (s *sights) devicesOf(f inode) []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.devices[f])
}

func (s *sights) setComplete() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.complete = true
}

func (s *sights) isComplete() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.complete
}

// Attached returns the indices of all attached devices, whoever attached them.
func Attached() ([]int, error) {
	nodes, err := existing()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(nodes, func(i int) bool { return !attached(i) }), nil
}

func backs(index int, f *os.File) (bool, error) {
	d, err := Open(index)
	if err != nil {
		return false, err
	}
	defer d.Close()
	return d.Backs(f)
}

// existing returns all loop devices that the kernel has, in no particular order.
func existing() ([]int, error) {
	dir, err := os.Open("/sys/block")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var nodes []int
	for _, name := range names {
		if i, ok := IndexOf("/dev/" + name); ok {
			nodes = append(nodes, i)
		}
	}
	return nodes, nil
}

// attached looks at sysfs, which disturbs nobody, while opening the device could.
func attached(index int) bool {
	return unix.Access("/sys/block/loop"+strconv.Itoa(index)+"/loop", unix.F_OK) == nil
}
