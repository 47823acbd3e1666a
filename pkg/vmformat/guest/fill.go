// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// unpack fills the new filesystem with the order's content, and unmounts it.
func (v *Verdict) unpack(disk string, index int, order Order, disks *disks) error {
	start := time.Now()
	v.enter(StageUnpack, index)
	defer func() { v.UnpackMS = time.Since(start).Milliseconds() }()
	// With one P the runtime hands it to another thread in each system call of more than 20 µs, which
	// under TCG are most. With a second one, idle, it leaves that: 10,000 small files take 7 s, not 14.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	name, err := disks.find(ContentSerial)
	if err != nil {
		return err
	}
	from, err := os.Open(name)
	if err != nil {
		return err
	}
	defer from.Close()
	job := order.Job
	const flags = unix.MS_NOATIME | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOSUID
	if err := unix.Mount(disk, mountPoint, job.Filesystem, flags, job.FillData); err != nil {
		return fmt.Errorf("the guest's kernel cannot mount the new %s with the options %q: %w", job.Filesystem, job.FillData, err)
	}
	err = v.fill(mountPoint, *job.Content, order.Layers, contentDisk{from, func(p Progress) { fmt.Println(p.line(index)) }})
	if unmountErr := unix.Unmount(mountPoint, 0); unmountErr != nil {
		err = errors.Join(err, fmt.Errorf("unmounting the filled %s: %w", job.Filesystem, unmountErr))
	}
	return err
}

// contentDisk is the disk with the archives, and where to tell how much of it was read.
type contentDisk struct {
	disk     io.ReaderAt
	progress func(Progress)
}

// fill unpacks all layers in a directory, and makes that durable. It records in v how much was
// unpacked, also if it fails.
func (v *Verdict) fill(dir string, c Content, layers []Layer, from contentDisk) error {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	u := newUnpacker(root, c)
	defer u.close()
	if err = u.all(layers, from); err == nil {
		// The kernel reports here what it could not write: syncfs(2).
		err = os.NewSyscallError("syncfs", unix.Syncfs(root))
	}
	v.Entries, v.Bytes = u.entries, u.bytes
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		v.Full = fullOf(root)
	}
	return err
}

// fullOf tells what a full filesystem has run out of.
func fullOf(root int) Full {
	var st unix.Statfs_t
	if err := unix.Fstatfs(root, &st); err == nil && st.Files > 0 && st.Ffree == 0 {
		return FullInodes // btrfs has no number of them
	}
	return FullSpace
}

// all unpacks all layers, bottom first.
func (u *unpacker) all(layers []Layer, from contentDisk) error {
	m := &meter{announce: from.progress, last: time.Now()}
	for _, l := range layers {
		m.total += l.Length
	}
	for i, l := range layers {
		if err := u.layer(&window{disk: from.disk, start: l.Offset, size: l.Length, read: m.read(l.Length)}); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return u.finish()
}

// meter announces how much of the archives was read.
type meter struct {
	announce    func(Progress)
	done, total int64 // bytes; done is that of the layers before this one
	last        time.Time
}

// meterPause is the time between two announcements. Each takes a millisecond on the emulated
// serial port.
const meterPause = 2 * time.Second

// read returns the function that is told how far the next layer was read. A layer with whiteouts is
// read twice, which this does not show.
func (m *meter) read(length int64) func(at int64) {
	before := m.done
	m.done += length
	return func(at int64) {
		if time.Since(m.last) >= meterPause {
			m.last = time.Now()
			m.announce(Progress{StageUnpack, min(before+at, m.total), m.total})
		}
	}
}

// window reads a part of a disk in large pieces. To seek in it costs nothing: an archive whose
// files are passed over is not read whole.
type window struct {
	disk        io.ReaderAt
	start, size int64 // of the part, in bytes
	at          int64 // where the next Read is, in the part
	piece       []byte
	pieceAt     int64
	read        func(at int64) // called after each piece
}

// pieceSize is how much is read from the disk at once. Larger pieces were no faster.
const pieceSize = 1 << 20

// Read is that of [io.Reader].
func (w *window) Read(b []byte) (int, error) {
	if w.at >= w.size {
		return 0, io.EOF
	}
	if w.at < w.pieceAt || w.at >= w.pieceAt+int64(len(w.piece)) {
		if err := w.load(); err != nil {
			return 0, err
		}
	}
	n := copy(b, w.piece[w.at-w.pieceAt:])
	w.at += int64(n)
	return n, nil
}

// load reads the piece that begins where the next Read is.
func (w *window) load() error {
	if w.piece == nil {
		w.piece = make([]byte, pieceSize)
	}
	w.piece = w.piece[:min(pieceSize, w.size-w.at)]
	n, err := w.disk.ReadAt(w.piece, w.start+w.at)
	w.piece, w.pieceAt = w.piece[:n], w.at
	if n == 0 {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // the disk ends before its layer
		}
		return err
	}
	w.read(w.at + int64(n))
	return nil
}

// Seek is that of [io.Seeker].
func (w *window) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += w.at
	case io.SeekEnd:
		offset += w.size
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	w.at = offset
	return offset, nil
}
