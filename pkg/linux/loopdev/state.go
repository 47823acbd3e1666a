// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// A loop device keeps some state when it is detached, and gives it to the next attachment,
// whoever set it (measured on 6.18):
//
//   - its read-only bit (BLKROSET). A filesystem does not mount from such a device.
//   - its write cache mode. In the mode "write through" the kernel drops flushes silently,
//     and data that was synced is lost in a power cut. To change it takes 8 to 20 ms, since the
//     kernel stops the device's queue for that, and waits until every processor has noticed.
//   - its limit of discards. With a limit of 0 the kernel also drops the granularity, and
//     then accepts no other limit (queue_max_discard_sectors_store in block/blk-sysfs.c). So
//     a device that refuses discards does so for ever. It is made for a single attachment,
//     and [Remove]d after it.
//
// None of it can be set before LOOP_CONFIGURE: until then the device is not provably ours.

// errUnfit means that the state of a device cannot be made what its attachment needs.
var errUnfit = errors.New("the loop device does not take the state that its file needs")

// Prepare gives an attached device the state that its attachment needs, and returns an error
// if the device does not take it. [Allocator.Attach] has done so; this is for a device that
// was found attached. Others may have changed its state since, and a program that attached
// it may have died before it had set the state, or knew nothing of it.
//
// A device that refuses discards without need is left so: that costs space and no data.
func (d *Device) Prepare(o Options) error {
	if err := d.setReadOnly(o.ReadOnly); err != nil {
		return err
	}
	// A device without writes has nothing to flush. One that was attached read-only has no
	// other mode than "write through".
	if !o.ReadOnly {
		if err := d.setFlushes(o.flushes()); err != nil {
			return err
		}
	}
	if o.NoDiscard {
		return d.refuseDiscards()
	}
	return nil
}

// prepare is [Device.Prepare] for a new attachment.
func (d *Device) prepare(o Options) error {
	if err := d.Prepare(o); err != nil || o.NoDiscard {
		return err
	}
	return d.acceptDiscards()
}

// setReadOnly sets or clears the bit that makes the kernel refuse writes.
//
// The device is attached writable even for readers. If it was attached read-only
// (LO_FLAGS_READ_ONLY), whoever can open it could exchange its file with LOOP_CHANGE_FD,
// which asks for no capability. Changing the bit takes CAP_SYS_ADMIN.
//
// "The LOOP_CHANGE_FD operation is possible only if the loop device is read-only and the new
// backing store is the same size and type as the old backing store." loop(4)
func (d *Device) setReadOnly(want bool) error {
	is, err := d.ReadOnly()
	if err != nil || is == want {
		return err
	}
	if err := d.setReadOnlyBit(want); err != nil {
		return fmt.Errorf("%w: %w", errUnfit, err)
	}
	if is, err = d.ReadOnly(); err == nil && is != want {
		err = fmt.Errorf("%w: %s is read-only: %v, want %v, and BLKROSET does not change that", errUnfit, d.Path(), is, want)
	}
	return err
}

// leaveWritable clears the read-only bit of a device that has just been detached, so that
// the next program to use it does not find it read-only. d is its last descriptor: until d
// is closed, the kernel lets nobody else open it. A device that others hold is still
// attached, and stays read-only for them.
func (d *Device) leaveWritable() error {
	if is, err := d.ReadOnly(); err != nil || !is {
		return err
	}
	if _, err := d.status(); !errors.Is(err, ErrNotAttached) {
		return err
	}
	return d.setReadOnlyBit(false)
}

func (d *Device) setReadOnlyBit(set bool) error {
	bit := 0
	if set {
		bit = 1
	}
	err := sys.Effect("BLKROSET", d.file, func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.BLKROSET, bit) })
	if err != nil {
		return fmt.Errorf("BLKROSET %s to %d: %w", d.Path(), bit, err)
	}
	return nil
}

// ReadOnly reports whether the device refuses writes: because of its bit, or because it was
// attached read-only.
func (d *Device) ReadOnly() (bool, error) {
	var bit int
	err := sys.On(d.file, func(fd int) (err error) {
		bit, err = unix.IoctlGetInt(fd, unix.BLKROGET)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("BLKROGET %s: %w", d.Path(), err)
	}
	return bit != 0, nil
}

// flushMode is what the kernel does with flushes: a write cache mode of the device.
type flushMode string

const (
	keepsFlushes flushMode = "write back"    // a flush of the device syncs its file
	dropsFlushes flushMode = "write through" // a flush does nothing
)

// flushes is the mode that an attachment needs.
func (o Options) flushes() flushMode {
	if o.DropFlushes {
		return dropsFlushes
	}
	return keepsFlushes
}

// setFlushes decides what the kernel does with flushes of the device.
//
// "write_cache: [RW] When read, this file will display whether the device has write back
// caching enabled or not. It will return "write back" for the former case, and "write
// through" for the latter. Writing to this file can change the kernels view of the device,
// but it doesn't alter the device state." Documentation/ABI/stable/sysfs-block
func (d *Device) setFlushes(want flushMode) error {
	is, err := d.attribute("write_cache")
	if err != nil || is == string(want) {
		return err
	}
	if err := d.setAttribute("write_cache", string(want)); err != nil {
		return fmt.Errorf("%w: the write cache of %s has the mode %q, want %q: %w", errUnfit, d.Path(), is, want, err)
	}
	if is, err = d.attribute("write_cache"); err == nil && is != string(want) {
		err = fmt.Errorf("%w: the write cache of %s has the mode %q, want %q", errUnfit, d.Path(), is, want)
	}
	return err
}

// refuseDiscards makes an attached device refuse discards.
//
// "discard_max_bytes: [RW] [...] can be used to limit the size of discards. A
// value of 0 disables them" Documentation/ABI/stable/sysfs-block
func (d *Device) refuseDiscards() error {
	limit, err := d.attribute("discard_max_bytes")
	if err != nil || limit == "0" {
		return err
	}
	return d.setAttribute("discard_max_bytes", "0")
}

// acceptDiscards makes an attached device accept discards as large as its file supports,
// rounded down: the kernel takes only multiples of the granularity for a limit.
func (d *Device) acceptDiscards() error {
	limit, err := d.number("discard_max_bytes")
	if err != nil {
		return err
	}
	could, err := d.number("discard_max_hw_bytes")
	if err != nil || limit == could {
		return err
	}
	granularity, err := d.number("discard_granularity")
	if err != nil {
		return err
	}
	if granularity == 0 {
		return fmt.Errorf("%w: %s refuses discards for ever", errUnfit, d.Path())
	}
	could -= could % granularity
	if limit == could {
		return nil
	}
	if err := d.setAttribute("discard_max_bytes", strconv.FormatUint(could, 10)); err != nil {
		return fmt.Errorf("%w: %s accepts discards of %d bytes, and could of %d: %w", errUnfit, d.Path(), limit, could, err)
	}
	if limit, err = d.number("discard_max_bytes"); err == nil && limit != could {
		err = fmt.Errorf("%w: %s accepts discards of %d bytes, and could of %d", errUnfit, d.Path(), limit, could)
	}
	return err
}

func (d *Device) number(name string) (uint64, error) {
	text, err := d.attribute(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s of %s is %q, and not a number", name, d.Path(), text)
	}
	return n, nil
}

func (d *Device) queue(name string) string {
	return fmt.Sprintf("/sys/block/loop%d/queue/%s", d.index, name)
}

// attribute reads an attribute of the device's queue. While the device is open, nobody can
// remove it, so the name in sysfs is its own.
//
// Reading one so takes 4 µs, and 9 µs through package os, which gives sysfs files to its
// poller. An attachment reads three.
func (d *Device) attribute(name string) (string, error) {
	path := d.queue(name)
	var fd, n int
	var buf [64]byte // such an attribute is a number or two words
	err := sys.Retry(func() (err error) {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err == nil {
		err = sys.Retry(func() (err error) {
			n, err = unix.Read(fd, buf[:])
			return err
		})
		unix.Close(fd)
	}
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return strings.TrimSuffix(string(buf[:n]), "\n"), nil
}

// setAttribute is called seldom: for state that others have left, and for devices that are
// to refuse discards or to drop flushes.
func (d *Device) setAttribute(name, value string) error {
	err := sys.PathEffect(name, func() error { return os.WriteFile(d.queue(name), []byte(value+"\n"), 0) })
	if err != nil {
		return fmt.Errorf("%w; in a container /sys must be writable: mount the node's there", err)
	}
	return nil
}
