// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package selinux

import (
	"os"
	"testing"
)

func TestListed(t *testing.T) {
	for list, want := range map[string]bool{
		"": false,
		"nodev\tsysfs\nnodev\tselinuxfs\n\text4\n":    true,
		"nodev\tsysfs\n\tselinuxfs2\nnodev\txfs\n":    false,
		"nodev\tsysfs\nnodev\tnot selinuxfs\n\txfs":   false,
		"nodev\tsysfs\nnodev\tselinuxfs":              true,
		"nodev\tsysfs\nnodev\tselinuxfs extra\n\txfs": false,
	} {
		if got := listed(list); got != want {
			t.Errorf("%q: %v", list, got)
		}
	}
}

// TestEnabled asks the kernel in another way: its directory in sysfs is there if SELinux is.
func TestEnabled(t *testing.T) {
	_, err := os.Stat("/sys/fs/selinux")
	if enabled, e := Enabled(); e != nil || enabled != (err == nil) {
		t.Errorf("%v, %v; /sys/fs/selinux: %v", enabled, e, err)
	}
}
