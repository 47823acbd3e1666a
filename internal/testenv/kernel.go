// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"unsafe"
)

// Statmount is the number of statmount(2), the same on all architectures. Linux has it since
// 6.8.
const Statmount = 457

// OldKernel is an environment variable that [OnOldKernel] sets.
const OldKernel = "CSI_DISKTEMPLATE_TEST_OLD_KERNEL"

// OnOldKernel runs tests of this package once more, in a process to which the kernel says that
// it does not know a system call. The tests are named by a regular expression, as for
// go test -run, and must not call OnOldKernel themselves.
func OnOldKernel(t *testing.T, call uint32, tests string) {
	t.Helper()
	Root(t)
	cmd := exec.Command(os.Args[0], "-test.run", "^("+tests+")$", "-test.count", "1", "-test.v")
	cmd.Env = append(os.Environ(), OldKernel+"=1")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	OnThread(func() {
		err := forget(call)
		if err == nil {
			err = cmd.Start() // it inherits the filter of this thread
		}
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			t.Error(err)
		}
	})
	if t.Failed() || !strings.Contains(out.String(), "--- PASS") {
		t.Errorf("without system call %d:\n%s", call, out.String())
	}
}

// forget makes the calling thread, and all processes that it starts, get ENOSYS for a system
// call.
//
// "SECCOMP_RET_ERRNO: This value results in the SECCOMP_RET_DATA portion of the filter's return
// value being passed to user space as the errno value without executing the system call."
// seccomp(2). A filter sees struct seccomp_data, which begins with the call's number.
func forget(call uint32) error {
	const (
		setSeccomp  = 22 // PR_SET_SECCOMP
		modeFilter  = 2  // SECCOMP_MODE_FILTER
		returnErrno = 0x00050000
		returnAllow = 0x7fff0000
	)
	filter := []syscall.SockFilter{
		{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: 0},
		{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: call, Jf: 1},
		{Code: syscall.BPF_RET | syscall.BPF_K, K: returnErrno | uint32(syscall.ENOSYS)},
		{Code: syscall.BPF_RET | syscall.BPF_K, K: returnAllow},
	}
	program := syscall.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, e := syscall.RawSyscall(syscall.SYS_PRCTL, setSeccomp, modeFilter, uintptr(unsafe.Pointer(&program))); e != 0 {
		return os.NewSyscallError("prctl(PR_SET_SECCOMP)", e)
	}
	return nil
}
