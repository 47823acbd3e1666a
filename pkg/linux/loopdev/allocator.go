// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrNotDirect means that the kernel would not do direct I/O on the file.
var ErrNotDirect = errors.New("the loop device cannot use direct I/O")

// Options of an attachment. The zero value is a writable device that stays
// until it is detached.
type Options struct {
	ReadOnly bool
	// AutoClear detaches the device when the last user of it goes. It is wrong
	// under a bind mount of the device node, which is no user.
	AutoClear bool
	// NoDiscard refuses discards, which would punch holes into the file: for one
	// whose space is reserved. It takes a device of its own, to be given to [Remove]
	// afterwards.
	NoDiscard bool
	// Name is lo_file_name, cut at [MaxName] bytes.
	Name string
}

// MaxName is how much of a name a device keeps, in bytes.
const MaxName = unix.LO_NAME_SIZE - 1

const (
	// tries bounds how many devices that were free a while ago are passed over
	// before a new one is made.
	tries = 4
	// steals bounds how often in a row others may take the device that we just
	// made. More than once is an accident already.
	steals = 16
)

// Allocator hands out loop devices to this process. Its zero value is usable.
//
// LOOP_CTL_GET_FREE names the same free device to everyone who asks, so that all
// but one meet EBUSY. An Allocator names each device to one goroutine at a time.
// Other processes know nothing of it; what they took is passed over.
//
// An autoclear device comes free without a word, so which are free is looked up
// in sysfs, at 5 µs per device, and in the mount table, when it has run out of those it
// knew. To make a
// new device instead, at 300 µs, leaves one more for ever. So with N devices it
// looks once in N/4 attachments at most: that costs each 20 µs, and it makes
// new ones only if N/4 were not free at the last look, which bounds N to 5/3 of
// what was ever attached at once.
type Allocator struct {
	mu     sync.Mutex   // held during a look, but for no attachment
	free   []int        // free at the last look, and not handed out since
	trying map[int]bool // in the hands of a goroutine: sysfs may show them as free yet
	nodes  int          // how many devices there were at the last look
	handed int          // how often take was called since
}

// Attach attaches a file to a free loop device. The kernel takes its own
// reference of the file, and fsyncs it: 25-200 µs, 1.5 ms after an unsynced clone.
//
// The device's blocks are [BlockSize] bytes; what the file has beyond the last
// whole sector of 512 bytes is not visible. A filesystem with smaller blocks,
// like the 1 KiB of a small default ext4, does not mount from it.
func (a *Allocator) Attach(backing *os.File, o Options) (*Device, error) {
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
		a.done(index)
		if !errors.Is(err, errTaken) && !errors.Is(err, unix.ENOENT) { // or removed since
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
		if d, err = attachIfFree(index, backing, o); !errors.Is(err, errTaken) {
			return d, err
		}
	}
	return nil, fmt.Errorf("attach %s: other processes took %d new loop devices in a row: %w", backing.Name(), steals, err)
}

// take names a device that may be free to one goroutine, until done. If it has
// none it is time for a new one.
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

func (a *Allocator) done(index int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.trying, index)
}

// look finds what is free, whoever made it: an earlier run of this program, too.
// In a container's own /dev some devices may have no node.
//
// A device whose node is mounted somewhere is not free: a pod has it. Whoever may
// open a device may detach it (LOOP_CLR_FD), and would then have the next file that
// is attached to it.
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
		if !a.trying[i] && !given[i] && !attached(i) && unix.Access(pathOf(i), unix.F_OK) == nil {
			a.free = append(a.free, i)
		}
	}
	a.nodes, a.handed = len(nodes), 0
	return nil
}

// mountedNodes are the loop devices whose nodes are bound to somewhere.
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
// returned" loop(4). Of a negative number the kernel makes the first that does
// not exist yet, loop_add() in drivers/block/loop.c.
func add() (int, error) {
	index, err := control("LOOP_CTL_ADD", unix.LOOP_CTL_ADD, ^uintptr(0))
	if err != nil {
		return 0, fmt.Errorf("LOOP_CTL_ADD: %w", err)
	}
	return index, nil
}

// control calls the driver itself.
func control(name string, request uint, arg uintptr) (int, error) {
	const path = "/dev/loop-control"
	f, err := sys.Open(path, func() (int, error) { return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) })
	if err != nil {
		return 0, fmt.Errorf("open %s: %w; is the module loop loaded, and in a container the host's /dev mounted?", path, err)
	}
	defer f.Close()
	var result uintptr
	err = sys.Effect(name, f, func(fd int) error {
		r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), arg)
		if e != 0 {
			return e
		}
		result = r
		return nil
	})
	return int(result), err
}

// errTaken means to try another device.
var errTaken = errors.New("the loop device is in use")

func attachIfFree(index int, backing *os.File, o Options) (*Device, error) {
	if attached(index) {
		return nil, errTaken
	}
	mode := unix.O_RDWR
	if o.ReadOnly {
		mode = unix.O_RDONLY
	}
	d, err := openNode(index, mode)
	if errors.Is(err, ErrNotAttached) { // it is just being detached
		return nil, fmt.Errorf("%w: %w", errTaken, err)
	}
	if err != nil {
		return nil, err
	}
	if err := d.configure(backing, o); err != nil {
		d.Close()
		return nil, err
	}
	if err := d.verify(backing, o); err != nil {
		return nil, errors.Join(err, d.Detach())
	}
	if o.NoDiscard {
		if err := d.refuseDiscard(); err != nil {
			return nil, errors.Join(err, d.Detach())
		}
		return d, nil
	}
	if refuses, err := d.refusesDiscard(); err != nil || refuses {
		if err := errors.Join(err, d.Detach()); err != nil {
			return nil, err
		}
		return nil, errors.Join(errTaken, Remove(index))
	}
	return d, nil
}

// Discards are refused by a limit that belongs to the device, not to the
// attachment, and for good: with it the kernel drops the granularity, and then
// accepts no limit but 0 (queue_max_discard_sectors_store in block/blk-sysfs.c on
// 6.18, measured). So a device that refuses is made for its one attachment, and
// [Remove] is for what is left of it.

// refuseDiscard takes discards away from an attached device.
//
// "discard_max_bytes: [RW] [...] can be used to limit the size of discards. A
// value of 0 disables them" Documentation/ABI/stable/sysfs-block
func (d *Device) refuseDiscard() error {
	err := sys.PathEffect("discard_max_bytes", func() error {
		return os.WriteFile(d.queue("discard_max_bytes"), []byte("0\n"), 0)
	})
	if err != nil {
		return fmt.Errorf("%w; in a container /sys must be writable: mount the node's there", err)
	}
	return nil
}

// refusesDiscard reports whether somebody has done that to a device whose file
// could do it.
func (d *Device) refusesDiscard() (bool, error) {
	limit, err := os.ReadFile(d.queue("discard_max_bytes"))
	if err != nil || string(limit) != "0\n" {
		return false, err
	}
	could, err := os.ReadFile(d.queue("discard_max_hw_bytes"))
	return err == nil && string(could) != "0\n", err
}

func (d *Device) queue(name string) string {
	return fmt.Sprintf("/sys/block/loop%d/queue/%s", d.index, name)
}

// Remove removes a free device, which takes 44 ms. One that is in use stays.
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

// configure attaches the file with all properties at once.
//
// "LOOP_CONFIGURE (since Linux 5.8): Setup and configure all loop device
// parameters in a single step" loop(4)
func (d *Device) configure(backing *os.File, o Options) error {
	config := unix.LoopConfig{Size: BlockSize, Info: unix.LoopInfo64{Flags: o.flags()}}
	name := config.Info.File_name[:]
	copy(name[:len(name)-1], o.Name)
	err := sys.On(backing, func(backingFd int) error {
		config.Fd = uint32(backingFd)
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

func (o Options) flags() uint32 {
	flags := uint32(unix.LO_FLAGS_DIRECT_IO)
	if o.ReadOnly {
		flags |= unix.LO_FLAGS_READ_ONLY
	}
	if o.AutoClear {
		flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	return flags
}

// verify looks at what LOOP_CONFIGURE made of the wishes: it ignores those that
// do not fit the file, and succeeds.
func (d *Device) verify(backing *os.File, o Options) error {
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
		return fmt.Errorf("attach %s: %s has blocks of %d bytes, not %d", backing.Name(), d.Path(), size, BlockSize)
	case status.Flags&unix.LO_FLAGS_DIRECT_IO == 0:
		return fmt.Errorf("%w: %s%s; make the pool with blocks of %d bytes", ErrNotDirect, backing.Name(), alignment(backing), BlockSize)
	case status.Flags&unix.LO_FLAGS_READ_ONLY != 0 && !o.ReadOnly:
		return fmt.Errorf("attach %s: the device became read-only, as the file is not open for writing", backing.Name())
	}
	return nil
}

// alignment is what direct I/O on the file needs, for the message: statx(2),
// stx_dio_offset_align, since Linux 6.1.
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
