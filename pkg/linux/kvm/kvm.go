// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package kvm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Device is KVM's device node.
const Device = "/dev/kvm"

// ErrUnusable means that guests must run without KVM here. The error that wraps it says
// why.
var ErrUnusable = errors.New("KVM is not usable")

// ioctl numbers of <linux/kvm.h>, the same on every architecture.
const (
	kvmGetAPIVersion = 0xae00
	kvmAPIVersion    = 12 // "applications should refuse to run if it is not 12"
)

// Usable returns nil if a guest kernel should run under KVM, or else [ErrUnusable] with
// the reason. It takes a few milliseconds where KVM works, and at most some hundred where
// it does not.
func Usable() error {
	dev, err := os.OpenFile(Device, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	defer dev.Close()
	version, err := unix.IoctlRetInt(int(dev.Fd()), kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("%w: %s: KVM_GET_API_VERSION: %w", ErrUnusable, Device, err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("%w: %s has API version %d, and %d is needed", ErrUnusable, Device, version, kvmAPIVersion)
	}
	if err := try(dev); err != nil {
		return fmt.Errorf("%w: %w", ErrUnusable, err)
	}
	return nil
}
