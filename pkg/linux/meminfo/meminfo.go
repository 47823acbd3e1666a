// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package meminfo reads how much memory the machine has.
//
// Source: proc_meminfo(5).
package meminfo

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Available returns how much memory programs can still be given, and how much there is, in bytes.
//
// "MemAvailable (since Linux 3.14): An estimate of how much memory is available for starting new
// applications, without swapping." proc_meminfo(5)
func Available() (available, total int64, err error) {
	const path = "/proc/meminfo"
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	if available, err = field(string(b), "MemAvailable"); err == nil {
		total, err = field(string(b), "MemTotal")
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return available, total, err
}

// field reads a line such as "MemTotal:       24683716 kB", in bytes.
func field(text, name string) (int64, error) {
	for line := range strings.Lines(text) {
		value, found := strings.CutPrefix(line, name+":")
		if !found {
			continue
		}
		kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 53)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		return kib << 10, nil
	}
	return 0, fmt.Errorf("has no %s", name)
}
