// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Attachment is what is behind a device.
type Attachment struct {
	Index int
	// Number is that of the attachment: the kernel gives another one to each, of whatever device. It is 0
	// before Linux 5.15.
	Number uint64
	Info
}

// looked has the latest attachment that was seen of each device.
var looked = struct {
	sync.Mutex
	at map[int]Attachment
}{at: map[int]Attachment{}}

// Attachments lists what is behind all devices, whoever attached them. It opens a device only if it has another
// attachment than at the last time: while a device is open, nobody can detach it. It takes some µs for each device.
func Attachments() ([]Attachment, error) {
	nodes, err := Attached()
	if err != nil {
		return nil, err
	}
	looked.Lock()
	defer looked.Unlock()
	now := map[int]Attachment{}
	var all []Attachment
	for _, index := range nodes {
		a, err := lookAgain(index, looked.at[index])
		if errors.Is(err, ErrNotAttached) || errors.Is(err, os.ErrNotExist) { // detached or removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		now[index] = a
		all = append(all, a)
	}
	looked.at = now
	return all, nil
}

// lookAgain returns the attachment of a device, given the one that it had before.
func lookAgain(index int, before Attachment) (Attachment, error) {
	number, err := numberOf(index)
	if err != nil || number != 0 && number == before.Number {
		return before, err
	}
	d, err := Open(index)
	if err != nil {
		return Attachment{}, err
	}
	defer d.Close()
	a := Attachment{Index: index}
	if a.Info, err = d.Info(); err != nil {
		return a, err
	}
	a.Number, err = numberOf(index)
	if err == nil && a.Number != number { // it was attached anew in between
		a.Number = 0
	}
	return a, err
}

// numberOf returns the number of a device's attachment, or 0 if the kernel has none.
//
// "The /sys/block/<disk>/diskseq files reports the disk sequence number, which is a monotonically increasing number
// assigned to every drive. Some devices, like the loop device, refresh such number every time the backing file is
// changed." Documentation/ABI/stable/sysfs-block
func numberOf(index int) (uint64, error) {
	b, err := os.ReadFile("/sys/block/" + nameOf(index) + "/diskseq")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) { // the latter while it is being removed
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// Stats reads what the device has done until now. If it has another attachment by then, the error is
// [ErrNotAttached].
//
// "read I/Os, read merges, read sectors, read ticks, write I/Os, […] io_ticks (milliseconds)", and "The "sectors" in
// question are the standard UNIX 512-byte sectors": Documentation/block/stat.rst
func (a Attachment) Stats() (Stats, error) {
	path := "/sys/block/" + nameOf(a.Index) + "/stat"
	b, err := os.ReadFile(path)
	if err != nil {
		return Stats{}, err
	}
	s, err := parseStats(string(b))
	if err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	// A number that is the same after the counters were read was that of the counters.
	number, err := numberOf(a.Index)
	if err == nil && number != a.Number {
		err = fmt.Errorf("%w: %s has another file by now", ErrNotAttached, pathOf(a.Index))
	}
	return s, err
}
