// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package watchedfile reads a file that somebody may replace at any time, as kubelet replaces the files of
// a ConfigMap's volume: it exchanges a symbolic link ("Mounted ConfigMaps are updated automatically" in
// Kubernetes' documentation, concepts/configuration/configmap).
//
// A file is looked at, and not watched with inotify(7): that would have to watch each directory on the
// way, and a look takes microseconds.
package watchedfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// maxSize is the most that a ConfigMap can hold, in bytes.
const maxSize = 1 << 20

// File is a file of at most 1 MiB. Nobody may use it from two goroutines at once.
type File struct {
	Path    string   // "" means none
	Content []byte   // what it had when it was read last
	seen    Identity // of the file that was read last
}

// Look reads the file if it has changed, and reports whether its content has. An error leaves what was
// read last.
func (f *File) Look() (changed bool, err error) {
	if f.Path == "" {
		return false, nil
	}
	// Opening a FIFO would hang without O_NONBLOCK.
	open, err := os.OpenFile(f.Path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer open.Close()
	now, err := Identify(open)
	if err != nil || now == f.seen {
		return false, err
	}
	content, err := io.ReadAll(io.LimitReader(open, maxSize+1))
	if err != nil {
		return false, err
	}
	if len(content) > maxSize {
		return false, fmt.Errorf("%s has more than %s", f.Path, size.Format(maxSize))
	}
	f.seen = now
	if bytes.Equal(content, f.Content) {
		return false, nil
	}
	f.Content = content
	return true, nil
}

// Identity changes whenever a file is replaced or written to.
//
// Caveat: two writes within one tick of the kernel's clock (10 ms or less) may leave the same times.
type Identity struct {
	Device, Inode uint64
	Size          int64 // bytes
	mtime, ctime  syscall.Timespec
}

// String is the same for the same identity.
func (i Identity) String() string {
	return fmt.Sprintf("%d %d %d %d.%09d %d.%09d",
		i.Device, i.Inode, i.Size, i.mtime.Sec, i.mtime.Nsec, i.ctime.Sec, i.ctime.Nsec)
}

// Identify returns the identity of an open file. Anything but a regular file is an error.
func Identify(f *os.File) (Identity, error) {
	fi, err := f.Stat()
	if err != nil {
		return Identity{}, err
	}
	if !fi.Mode().IsRegular() {
		return Identity{}, &os.PathError{Op: "read", Path: f.Name(), Err: errors.New("not a regular file")}
	}
	st := fi.Sys().(*syscall.Stat_t)
	return Identity{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}
