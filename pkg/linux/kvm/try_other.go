// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package kvm

import "os"

// try has nothing to add where KVM exists only on top of hardware support: the
// device that answers is the proof.
func try(*os.File) error { return nil }
