// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package loops finds the loop devices that belong to a test, and only those.
//
// All programs of a machine share its loop devices, whatever namespaces they are in. Another test, a package manager or
// a virtual machine may attach one at any time. A name is no proof of ownership, and neither is a path: in another mount
// namespace the same path is another file. So the device and inode of the backing file decide, which LOOP_GET_STATUS64
// tells; see loop(4).
package loops

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// File identifies a file, as stat(2) does.
type File struct{ Dev, Ino uint64 }

// Device is an attached loop device.
type Device struct {
	Name    string // without /dev
	Label   string // lo_file_name, which proves nothing
	Number  uint64 // its device number
	Path    string // the backing file's path, from sysfs: Documentation/ABI/testing/sysfs-block-loop
	Backing File
	Block   uint64 // the backing file's own device number, if it is a block device
}

func (d Device) String() string { return fmt.Sprintf("/dev/%s on %s", d.Name, d.Path) }

// FileOf identifies the file at a path.
func FileOf(path string) (File, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return File{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return File{Dev: st.Dev, Ino: st.Ino}, nil
}

// List returns every attached loop device of the machine. Devices that are detached meanwhile are left out.
func List() ([]Device, error) { return list(func(string) bool { return true }) }

// list looks only at the devices whose backing file's path passes a filter. Looking means to open the device, which
// delays its end if it is about to be detached.
func list(look func(path string) bool) ([]Device, error) {
	all, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	var found []Device
	for _, entry := range all {
		name := entry.Name()
		if !strings.HasPrefix(name, "loop") {
			continue
		}
		b, err := os.ReadFile("/sys/block/" + name + "/loop/backing_file") // a device that is not attached has none
		path := strings.TrimSuffix(string(b), "\n")
		if err != nil || !look(path) {
			continue
		}
		d, err := status(name)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		d.Path = path
		found = append(found, d)
	}
	return found, nil
}

// status asks the kernel about a device: ioctl(LOOP_GET_STATUS64) returns ENXIO if it is not attached.
func status(name string) (Device, error) {
	f, err := os.Open(filepath.Join("/dev", name))
	if err != nil {
		return Device{}, err
	}
	defer f.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return Device{}, os.NewSyscallError("fstat", err)
	}
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return Device{}, fmt.Errorf("/dev/%s: %w", name, os.NewSyscallError("LOOP_GET_STATUS64", err))
	}
	return Device{Name: name, Label: unix.ByteSliceToString(info.File_name[:]), Number: st.Rdev, Backing: File{Dev: info.Device, Ino: info.Inode}, Block: info.Rdevice}, nil
}

// Above returns the devices that are attached to a file, and those that are stacked on them: attached to a file of the
// filesystem on such a device, or to such a device itself. Each comes after all that are stacked on it. Files on btrfs
// have device numbers that do not tell the device below: what is stacked on a btrfs is not found.
func Above(devices []Device, file File) []Device {
	var found []Device
	// Numbers are used again, so a list that is not of one moment may have a ring.
	seen := map[string]bool{}
	var add func(on func(Device) bool)
	add = func(on func(Device) bool) {
		for _, d := range devices {
			if on(d) && !seen[d.Name] {
				seen[d.Name] = true
				add(func(upper Device) bool { return upper.Backing.Dev == d.Number || upper.Block == d.Number })
				found = append(found, d)
			}
		}
	}
	add(func(d Device) bool { return d.Backing == file })
	return found
}

// Below lists the attached devices whose backing file is, or was, in a directory or below it.
func Below(dir string) ([]Device, error) {
	root := dir
	here, err := FileOf(root)
	for errors.Is(err, fs.ErrNotExist) && root != "/" { // the directory is gone, and its files may still be open
		root = filepath.Dir(root)
		here, err = FileOf(root)
	}
	if err != nil {
		return nil, err
	}
	devices, err := list(func(path string) bool { return strings.HasPrefix(path, dir+"/") })
	return below(devices, dir, here.Dev), err
}

// below picks the devices whose backing file has a path below dir and is on dir's filesystem. Neither is enough alone:
// the filesystem may have other directories, and in another mount namespace the path is another file.
func below(devices []Device, dir string, filesystem uint64) []Device {
	return slices.DeleteFunc(slices.Clone(devices), func(d Device) bool {
		return !strings.HasPrefix(d.Path, dir+"/") || d.Backing.Dev != filesystem
	})
}
