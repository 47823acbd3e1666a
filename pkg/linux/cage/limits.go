// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package cage

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Limits bound what a program takes of the machine. For each, 0 means no limit. A
// core is never dumped.
type Limits struct {
	Memory int64         // bytes of address space
	CPU    time.Duration // of all threads together, rounded up to whole seconds; then the program is killed
	Files  int           // descriptors open at once
}

// set sets the limits of a program that was just started as the given user.
//
// Go cannot set them between fork and execve, and this process has one set of limits
// for all its threads. So the program runs without limits for a moment. It gains nothing
// by that: whenever it asks for more, the kernel compares the limit with everything that
// it has by then.
//
// The first process of a PID namespace ignores SIGXCPU, but not the SIGKILL that
// comes at the hard limit: pid_namespaces(7).
func (l Limits) set(pid int, uid, gid uint32) error {
	return asUser(uid, gid, func() error {
		for _, limit := range []struct {
			name     string
			resource int
			value    uint64
			bounded  bool
		}{
			{"RLIMIT_AS", unix.RLIMIT_AS, uint64(l.Memory), l.Memory > 0},
			{"RLIMIT_CPU", unix.RLIMIT_CPU, uint64((l.CPU + time.Second - 1) / time.Second), l.CPU > 0},
			{"RLIMIT_NOFILE", unix.RLIMIT_NOFILE, uint64(l.Files), l.Files > 0},
			{"RLIMIT_CORE", unix.RLIMIT_CORE, 0, true},
		} {
			if !limit.bounded {
				continue
			}
			both := &unix.Rlimit{Cur: limit.value, Max: limit.value}
			if err := sys.Retry(func() error { return unix.Prlimit(pid, limit.resource, both, nil) }); err != nil {
				return fmt.Errorf("prlimit %s: %w", limit.name, err)
			}
		}
		return nil
	})
}

// asUser calls do while the calling thread has other real IDs. Its effective IDs, which
// decide about everything else, stay root's.
//
// "the caller must have the CAP_SYS_RESOURCE capability in the user namespace of
// the process whose resource limits are being changed, or the real, effective, and
// saved set user IDs of the target process must match the real user ID of the
// caller and the real, effective, and saved set group IDs of the target process
// must match the real group ID of the caller." prlimit(2). Root does not have that
// capability everywhere.
func asUser(uid, gid uint32, do func() error) (err error) {
	if err := setReal(uid, gid); err != nil {
		return err
	}
	// With their real ID left here, processes of that user could send signals: kill(2).
	defer func() { err = errors.Join(err, setReal(0, 0)) }()
	return do()
}

// setReal sets the real IDs of the calling thread only. Package syscall would set those
// of all threads.
func setReal(uid, gid uint32) error {
	const keep = ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), keep, keep); errno != 0 {
		return os.NewSyscallError("setresgid", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), keep, keep); errno != 0 {
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}
