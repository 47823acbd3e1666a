// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Stats count what a device has done. They go on counting from one attachment to the next.
type Stats struct {
	Reads, Writes           uint64        // requests that were completed
	ReadBytes, WrittenBytes uint64        // in them
	Busy                    time.Duration // in which at least one request was under way
}

// Minus is what was done since an earlier time.
func (s Stats) Minus(o Stats) Stats {
	return Stats{s.Reads - o.Reads, s.Writes - o.Writes, s.ReadBytes - o.ReadBytes, s.WrittenBytes - o.WrittenBytes, s.Busy - o.Busy}
}

// Plus adds what was done by two devices, or at two times.
func (s Stats) Plus(o Stats) Stats {
	return Stats{s.Reads + o.Reads, s.Writes + o.Writes, s.ReadBytes + o.ReadBytes, s.WrittenBytes + o.WrittenBytes, s.Busy + o.Busy}
}

// sector is the unit of the kernel's counters, in bytes.
const sector = 512

func parseStats(text string) (s Stats, err error) {
	fields := strings.Fields(text)
	if len(fields) < 10 {
		return s, fmt.Errorf("has %d fields, not 10 or more", len(fields))
	}
	var n [10]uint64
	for i := range n {
		if n[i], err = strconv.ParseUint(fields[i], 10, 64); err != nil {
			return s, err
		}
	}
	return Stats{
		Reads: n[0], ReadBytes: n[2] * sector, Writes: n[4], WrittenBytes: n[6] * sector,
		Busy: time.Duration(n[9]) * time.Millisecond,
	}, nil
}
