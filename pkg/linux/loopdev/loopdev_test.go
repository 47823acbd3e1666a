// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestIndexOf(t *testing.T) {
	for path, want := range map[string]int{
		"/dev/loop0":        0,
		"/dev/loop7":        7,
		"/dev/loop1234":     1234,
		"/dev/loop7p1":      -1,
		"/dev/loop07":       -1,
		"/dev/loop+7":       -1,
		"/dev/loop-7":       -1,
		"/dev/loop":         -1,
		"/dev/loop-control": -1,
		"loop7":             -1,
		"7":                 -1,
		"":                  -1,
	} {
		i, ok := IndexOf(path)
		if ok != (want >= 0) || ok && i != want {
			t.Errorf("IndexOf(%q) is %d, %v; want %d", path, i, ok, want)
		}
	}
}

// TestWithoutLoopDriver: opening loop-control loads the module, unless it is not there.
func TestWithoutLoopDriver(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOENT, unix.ENODEV} {
		if err := whyNoControl(errno); !errors.Is(err, errno) || !strings.Contains(err.Error(), "modprobe loop") {
			t.Errorf("%v: the message is %v", errno, err)
		}
	}
	if err := whyNoControl(unix.EMFILE); err != unix.EMFILE {
		t.Errorf("another error: %v", err)
	}
}

func TestTakeNamesADeviceOnce(t *testing.T) {
	// As if it had just looked, among many devices.
	a := Allocator{nodes: 1000, free: []int{1, 2, 3}}
	var got []int
	for range 5 {
		i, ok, err := a.take()
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			got = append(got, i)
		}
	}
	slices.Sort(got)
	if want := []int{1, 2, 3}; !slices.Equal(got, want) {
		t.Errorf("the devices are %v, want %v", got, want)
	}
	a.done(2)
	if a.trying[2] || !a.trying[1] || !a.trying[3] || a.handed != 5 {
		t.Errorf("after done(2) the allocator is %+v", &a)
	}
}
