// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package boot tells one boot of the kernel from another.
//
// Caveat: some managers of containers give each container an id of its own, which differs from
// the kernel's and from that of the container's next start.
//
// Source: random(4), /proc/sys/kernel/random/boot_id.
package boot

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
)

const path = "/proc/sys/kernel/random/boot_id"

// ID is the id of this boot, a UUID as text. It is read once.
//
// "The read-only files uuid and boot_id contain random strings [...]. The former is generated
// afresh for each read, the latter was generated once." random(4)
var ID = sync.OnceValues(func() (string, error) {
	if id := failpoint.Boot(); id != "" {
		return id, nil
	}
	b, err := os.ReadFile(path)
	id := strings.TrimSpace(string(b))
	if err == nil && id == "" {
		err = fmt.Errorf("%s is empty", path)
	}
	return id, err
})
