// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sys

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// OnThread runs f on a thread that ends when f returns, and what f changes of the thread
// ends with it: its namespaces, its root, its capabilities.
func OnThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		// The thread is never unlocked, so it ends with the goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread would not end, and its namespaces are those that /proc shows
			// for the process. While this goroutine holds it, f gets another thread.
			defer runtime.UnlockOSThread()
			result <- OnThread(f)
			return
		}
		result <- f()
	}()
	return <-result
}

// PivotTo makes dir, which must be a mount point, the root of a thread that has a mount
// namespace of its own, and drops all other mounts from the namespace.
//
// pivot_root(".", ".") stacks the old root on the new one; pivot_root(2), NOTES.
func PivotTo(dir string) error {
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("dropping the old root: %w", err)
	}
	return unix.Chdir("/")
}
