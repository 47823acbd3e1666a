// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build !failpoints

package failpoint

// Before announces an effect by the name of its system call.
func Before(string) error { return nil }

// Init returns the program that a test wants as the VM's init, or "".
func Init() string { return "" }

// Boot returns the id of the boot that a test wants, or "".
func Boot() string { return "" }
