// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kvm finds out by a trial whether this machine's KVM can run a kernel.
//
// The presence of /dev/kvm says little. Some hosts have a device that emulates
// instructions one by one, at microseconds each, so that a guest kernel stalls without any
// error. So [Usable] runs some thousand real-mode instructions and measures the time.
//
// Source: Documentation/virt/kvm/api.rst.
package kvm
