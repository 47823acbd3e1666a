// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Unshare gives the calling thread a mount namespace of its own, with copies of all mounts.
// What others mount and unmount from then on happens here too, except on mounts that are
// private there: their copies keep the filesystem busy as long as the namespace lives. What is
// mounted here stays here, and is gone with the last process of the namespace.
//
// The caller must have called [runtime.LockOSThread], and must never unlock the thread: the
// rest of the process stays in the old namespace. An execve(2) by this thread takes the whole
// process along.
//
// "CLONE_NEWNS: Unshare the mount namespace, so that the calling process has a private copy of
// its namespace which is not shared with any other process. [...] Use of CLONE_NEWNS requires
// the CAP_SYS_ADMIN capability." unshare(2)
func Unshare() error {
	if err := sys.Retry(func() error { return unix.Unshare(unix.CLONE_NEWNS) }); err != nil {
		return fmt.Errorf("making a mount namespace: %w", os.NewSyscallError("unshare", err))
	}
	// "MS_SLAVE: [...] mount and unmount events propagate into this mount point from the (master)
	// shared peer group of which it was formerly a member." mount(2)
	if err := sys.Retry(func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "") }); err != nil {
		return fmt.Errorf("making the mounts of a new namespace its own: %w", os.NewSyscallError("mount", err))
	}
	return nil
}
