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

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrNotDirect means that the kernel does not do direct I/O on the file.
var ErrNotDirect = errors.New("the loop device cannot use direct I/O")

// ErrNone means that there is no loop device to be had, whatever the file is.
var ErrNone = errors.New("there is no loop device to be had")

// Options of an attachment. The zero value is a writable device that stays
// until it is detached.
type Options struct {
	// ReadOnly makes the kernel refuse writes to the device. The file must be open for writing
	// all the same: state.go says why.
	ReadOnly bool
	// AutoClear detaches the device when its last user goes. Do not set it for a device
	// whose node is bind-mounted: such a mount does not count as a user.
	AutoClear bool
	// NoDiscard makes the device refuse discards. It is for a file whose space is reserved,
	// since discards punch holes into the file. It takes a device of its own, which must be
	// given to [Remove] afterwards.
	NoDiscard bool
	// DropFlushes makes a sync of what is on the device cost nothing and mean nothing. All writes
	// still reach the file, in any order; a power cut may leave any of them out. Nothing changes
	// while this kernel runs.
	DropFlushes bool
	// Name is lo_file_name, cut at [MaxName] bytes. It is for people to read and proves
	// nothing: anybody may give any name.
	Name string
}

// MaxName is the length of a device's name, in bytes, beyond which it is cut.
const MaxName = unix.LO_NAME_SIZE - 1

const (
	// tries bounds how many devices of the last look are tried before a new one is made.
	// Another process can have taken each of them since.
	tries = 4
	// steals bounds how often in a row other processes may take the device that Attach has
	// just made. That they take even two is unlikely.
	steals = 16
)

// Allocator picks loop devices for this process. Its zero value is usable.
//
// LOOP_CTL_GET_FREE returns the same free device to everyone who asks, so that all but one
// get EBUSY. An Allocator gives each device to one goroutine at a time.
// Other processes do not know about it, so it skips the devices that they took.
//
// A device that detached itself is used again as soon as somebody in this process has looked at
// it ([Open]), for example to see that an unmounted volume is gone.
//
// Nobody is told when other devices become free. So when the Allocator has run out
// of devices, it looks for free ones in sysfs, which takes 5 µs per device, and in the
// mount table. Making a new device takes 300 µs instead, and leaves one more for ever.
// So with N devices it looks once in N/4 attachments at most. That costs 20 µs per
// attachment, and it makes new devices only if fewer than N/4 were free at the last look,
// which bounds N to 5/3 of the most devices that were ever attached at once.
type Allocator struct {
	mu     sync.Mutex   // held during a look, and never during an attachment
	free   []int        // free at the last look or given back since, and not given out
	trying map[int]bool // given to a goroutine: sysfs may still show them as free
	nodes  int          // how many devices there were at the last look
	handed int          // how often take was called since the last look
}

// Attach syncs a file and attaches it to a free loop device: 25-200 µs, or 1.5 ms after an
// unsynced clone. The kernel takes its own reference to the file.
//
// The kernel syncs the file too, and ignores how that went (loop_configure in
// drivers/block/loop.c): if the disk is full, direct I/O would then read what was there
// before the writes that failed.
//
// The device's blocks have [BlockSize] bytes. The end of the file after its last
// whole sector of 512 bytes is not visible. A filesystem with smaller blocks,
// such as the 1 KiB of a small default ext4, does not mount from the device.
func (a *Allocator) Attach(backing *os.File, o Options) (*Device, error) {
	if err := sys.Effect("fsync", backing, unix.Fsync); err != nil {
		return nil, fmt.Errorf("attach %s: fsync: %w", backing.Name(), err)
	}
	for range tries {
		if o.NoDiscard {
			break
		}
		index, ok, err := a.take()
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		d, err := attachIfFree(index, backing, o)
		if errors.Is(err, errUnfit) {
			// It is free, and of no use. If it cannot be removed, it is passed over again.
			_ = Remove(index)
		}
		a.done(index)
		if err == nil {
			a.lend(index, o)
		}
		if !errors.Is(err, errTaken) && !errors.Is(err, errUnfit) && !errors.Is(err, unix.ENOENT) { // ENOENT: it was removed since
			return d, err
		}
	}
	var err error
	for range steals {
		var index int
		if index, err = add(); err != nil {
			return nil, err
		}
		var d *Device
		if d, err = attachIfFree(index, backing, o); err == nil {
			a.lend(index, o)
			return d, nil
		}
		if !errors.Is(err, errTaken) {
			// The next try would make one more. Nobody else has it: a device that is in use stays.
			return nil, errors.Join(err, Remove(index))
		}
	}
	return nil, fmt.Errorf("attach %s: other processes took %d new loop devices in a row: %w", backing.Name(), steals, err)
}

// take gives the caller a device that may be free, and gives it to nobody else until
// done. If ok is false, it is time to make a new device.
func (a *Allocator) take() (index int, ok bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 && a.handed >= a.nodes/4 {
		if err := a.look(); err != nil {
			return 0, false, err
		}
	}
	a.handed++
	last := len(a.free) - 1
	if last < 0 {
		return 0, false, nil
	}
	index, a.free = a.free[last], a.free[:last]
	if a.trying == nil {
		a.trying = map[int]bool{}
	}
	a.trying[index] = true
	return index, true, nil
}

// lend notes whether a device that was attached with these options comes back.
func (a *Allocator) lend(index int, o Options) {
	if !o.AutoClear || o.NoDiscard {
		a = nil
	}
	seen.lend(index, a)
}

// giveBack takes a device that detached itself. Its node is bind-mounted nowhere: it was
// attached for a mount or a moment, and not for a pod to open.
func (a *Allocator) giveBack(index int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Contains(a.free, index) {
		a.free = append(a.free, index)
	}
}

func (a *Allocator) done(index int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.trying, index)
}

// look finds the free devices, whoever made them, for example an earlier run of this
// program.
//
// A device whose node is mounted somewhere does not count as free, since a pod has it.
// Whoever can open a device can detach its file (LOOP_CLR_FD), and could then use the next
// file that is attached to it.
func (a *Allocator) look() error {
	nodes, err := existing()
	if err != nil {
		return err
	}
	given, err := mountedNodes()
	if err != nil {
		return err
	}
	for _, i := range nodes {
		if !a.trying[i] && !given[i] && !attached(i) {
			a.free = append(a.free, i)
		}
	}
	a.nodes, a.handed = len(nodes), 0
	return nil
}

// mountedNodes returns the loop devices whose nodes are bind-mounted somewhere.
func mountedNodes() (map[int]bool, error) {
	given := map[int]bool{}
	_, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if index, ok := IndexOf("/dev" + m.Root); ok && m.FSType == "devtmpfs" {
			given[index] = true
		}
		return true, false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	return given, nil
}

// add makes a new device.
//
// "LOOP_CTL_ADD: Add the new loop device whose device number is specified as a
// long integer in the third ioctl(2) argument. On success, the device index is
// returned" loop(4). For a negative number the kernel makes the first device that does
// not exist yet: loop_add() in drivers/block/loop.c.
func add() (int, error) {
	index, err := control("LOOP_CTL_ADD", unix.LOOP_CTL_ADD, ^uintptr(0))
	if errors.Is(err, unix.ENOSPC) { // of device numbers, not of a disk: callers must not take it for that
		return 0, fmt.Errorf("%w: LOOP_CTL_ADD: %v", ErrNone, err)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: LOOP_CTL_ADD: %w", ErrNone, err)
	}
	return index, nil
}

// Count returns how many loop devices there are, and how many of them have a file, whoever attached it.
func Count() (all, attachedTo int, err error) {
	nodes, err := existing()
	for _, i := range nodes {
		if attached(i) {
			attachedTo++
		}
	}
	return len(nodes), attachedTo, err
}

// control makes an ioctl on the loop driver itself.
func control(ioctl string, request uint, arg uintptr) (int, error) {
	f, err := devfs.Open("loop-control", unix.O_RDWR)
	if err != nil {
		return 0, whyNoControl(err)
	}
	defer f.Close()
	var result uintptr
	err = sys.Effect(ioctl, f, func(fd int) error {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), arg)
		if e != 0 {
			return e
		}
		result = r
		return nil
	})
	return int(result), err
}

// whyNoControl adds what to do if the loop driver has no node, or one that leads nowhere.
func whyNoControl(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%w: the kernel's module loop is not loaded; run `modprobe loop` on the node, and list it in /etc/modules-load.d", err)
	}
	return err
}

// errTaken means that another device must be tried.
var errTaken = errors.New("the loop device is in use")

func attachIfFree(index int, backing *os.File, o Options) (*Device, error) {
	if attached(index) {
		return nil, errTaken
	}
	d, err := openNode(index, unix.O_RDWR)
	if errors.Is(err, ErrNotAttached) { // it is being detached at this moment
		return nil, fmt.Errorf("%w: %w", errTaken, err)
	}
	if err != nil {
		return nil, err
	}
	if err := d.configure(backing, o); err != nil {
		d.Close()
		return nil, err
	}
	err = d.verify(backing)
	if err == nil {
		err = d.prepare(o)
	}
	if err == nil {
		return d, nil
	}
	if stays := d.Detach(); stays != nil {
		// Its file must not get a second device, so the error is not errUnfit any more.
		return nil, fmt.Errorf("%v: %w", err, stays)
	}
	return nil, err
}

// Remove removes a free device, which takes 44 ms. A device that is in use stays, without
// an error.
//
// "LOOP_CTL_REMOVE: Remove the loop device whose device number is specified as a
// long integer in the third ioctl(2) argument" loop(4)
func Remove(index int) error {
	_, err := control("LOOP_CTL_REMOVE", unix.LOOP_CTL_REMOVE, uintptr(index))
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("LOOP_CTL_REMOVE %d: %w", index, err)
	}
	return nil
}

// configure attaches the file with all its properties in one call. The device keeps an open
// file description of its own, so that [Find] can tell it from the caller's.
//
// "LOOP_CONFIGURE (since Linux 5.8): Setup and configure all loop device
// parameters in a single step" loop(4)
func (d *Device) configure(backing *os.File, o Options) error {
	config := unix.LoopConfig{Size: BlockSize, Info: unix.LoopInfo64{Flags: o.flags()}}
	name := config.Info.File_name[:]
	copy(name[:len(name)-1], o.Name)
	own, err := again(backing)
	if err != nil {
		return fmt.Errorf("attach %s: %w", backing.Name(), err)
	}
	defer own.Close()
	err = sys.On(own, func(ownFd int) error {
		config.Fd = uint32(ownFd)
		return sys.Effect("LOOP_CONFIGURE", d.file, func(fd int) error { return unix.IoctlLoopConfigure(fd, &config) })
	})
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: LOOP_CONFIGURE %s: %w", errTaken, d.Path(), err)
	case err != nil:
		return fmt.Errorf("LOOP_CONFIGURE %s with %s: %w", d.Path(), backing.Name(), err)
	}
	return nil
}

// again opens a file once more, for what it is open for, whether or not it has a name.
func again(f *os.File) (*os.File, error) {
	return sys.OpenAt(f.Name(), f, func(fd int) (int, error) {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			return 0, err
		}
		return unix.Open("/proc/self/fd/"+strconv.Itoa(fd), flags&unix.O_ACCMODE|unix.O_CLOEXEC, 0)
	})
}

func (o Options) flags() uint32 {
	flags := uint32(unix.LO_FLAGS_DIRECT_IO)
	if o.AutoClear {
		flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	return flags
}

// verify checks the properties of an attachment: LOOP_CONFIGURE succeeds even where it
// ignores a property that does not fit the file.
func (d *Device) verify(backing *os.File) error {
	status, err := d.status()
	if err != nil {
		return err
	}
	var size int
	err = sys.On(d.file, func(fd int) (err error) {
		size, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	switch {
	case err != nil:
		return fmt.Errorf("BLKSSZGET %s: %w", d.Path(), err)
	case size != BlockSize:
		return fmt.Errorf("attach %s: %s has blocks of %d bytes, want %d", backing.Name(), d.Path(), size, BlockSize)
	case status.Flags&unix.LO_FLAGS_DIRECT_IO == 0:
		return fmt.Errorf("%w: %s%s; it must be on a filesystem with direct I/O in blocks of %d bytes", ErrNotDirect, backing.Name(), alignment(backing), BlockSize)
	case status.Flags&unix.LO_FLAGS_READ_ONLY != 0:
		return fmt.Errorf("attach %s: the device is read-only, because the file is not open for writing", backing.Name())
	}
	return nil
}

// alignment describes the alignment that direct I/O on the file needs, for a message:
// stx_dio_offset_align in statx(2), since Linux 6.1.
func alignment(f *os.File) string {
	var st unix.Statx_t
	err := sys.On(f, func(fd int) error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st) })
	switch {
	case err != nil || st.Mask&unix.STATX_DIOALIGN == 0:
		return ""
	case st.Dio_offset_align == 0:
		return " is on a filesystem without direct I/O"
	}
	return fmt.Sprintf(" needs direct I/O in units of %d bytes", st.Dio_offset_align)
}
