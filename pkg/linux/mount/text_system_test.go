// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package mount

import (
	"os"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// ownDevEnv is set where this test runs with a /dev of its own.
const ownDevEnv = "CSI_DISKTEMPLATE_TEST_OWN_DEV"

// TestNewByText mounts by mount(2), also in a process whose /dev has not the kernel's nodes: the
// mount is like any other, and the process's own mounts are as before.
func TestNewByText(t *testing.T) {
	dev := device(t, mkfs("btrfs")...)
	before, err := At("/proc")
	if err != nil || before == nil {
		t.Fatalf("/proc: %+v, %v", before, err)
	}
	attr := Attr{NoSUID: true, NoDev: true, NoATime: true}
	d, err := newByText(Config{FSType: "btrfs", Source: dev.Path(), Data: []string{"noacl"}, Attr: attr})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if after, err := At("/proc"); err != nil || after == nil || *after != *before {
		t.Errorf("/proc was %+v, and is %+v: %v", before, after, err)
	}
	at := target(t, false)
	if err := d.Attach(at); err != nil {
		t.Fatal(err)
	}
	m, err := At(at.Name())
	if err != nil || m == nil || m.FSType != "btrfs" || m.Source != dev.Path() || m.Attr != attr || m.Root != "/" {
		t.Errorf("it is mounted as %+v: %v", m, err)
	}
	if _, err := newByText(Config{FSType: "btrfs", Source: "/dev/nothing"}); err == nil {
		t.Error("nothing is mounted")
	}
	if os.Getenv(ownDevEnv) == "" {
		t.Setenv(ownDevEnv, "1")
		args := append(testenv.OwnDev(), os.Args[0], "-test.v", "-test.run=^TestNewByText$")
		if out := testenv.Run(t, args[0], args[1:]...); !strings.Contains(out, "--- PASS: TestNewByText") {
			t.Errorf("with a /dev of its own: %s", out)
		}
	}
}
