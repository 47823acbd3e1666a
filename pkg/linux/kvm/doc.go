// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package kvm tells whether this machine's KVM can run a kernel, by trying.
//
// The presence of /dev/kvm says little: some hosts offer a device behind which
// instructions are emulated one by one, at microseconds each, where a guest
// kernel stalls without any error. So [Usable] runs a few thousand real-mode
// instructions and looks at the clock.
//
// Source: Documentation/virt/kvm/api.rst.
package kvm
