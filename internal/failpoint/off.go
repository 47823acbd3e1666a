// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build !failpoints

package failpoint

// Before announces an effect, by the name of the system call that has it.
func Before(string) error { return nil }

// Init is the program that tests want as the VM's init, or "".
func Init() string { return "" }
