// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package process

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Capability is a capability of capabilities(7).
type Capability uint

// Capabilities that callers ask for.
const (
	SysAdmin    Capability = unix.CAP_SYS_ADMIN
	SysResource Capability = unix.CAP_SYS_RESOURCE
)

// Capable reports whether the calling thread has a capability in effect.
//
// "effective: This is the set of capabilities used by the kernel to perform permission checks for the thread."
// capabilities(7)
func Capable(c Capability) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("capget: %w", err)
	}
	return data[c/32].Effective&(1<<(c%32)) != 0, nil
}
