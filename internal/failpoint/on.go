// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

var (
	mu    sync.Mutex
	known int // the number of the plan
	count int // effects since it was written
)

var errnos = map[string]syscall.Errno{
	"ENOSPC": syscall.ENOSPC, "EIO": syscall.EIO, "EBUSY": syscall.EBUSY, "EINTR": syscall.EINTR, "ENOMEM": syscall.ENOMEM,
}

// Before announces an effect by the name of its system call. An error means that the
// effect must not happen.
func Before(effect string) error {
	dir := os.Getenv(Env)
	if dir == "" {
		return nil
	}
	mu.Lock()
	defer mu.Unlock()
	b, err := os.ReadFile(filepath.Join(dir, PlanFile))
	if err != nil {
		return nil // no plan
	}
	var plan, at int
	var what string
	if _, err := fmt.Sscan(string(b), &plan, &at, &what); err != nil {
		panic(fmt.Sprintf("plan %q: %v", b, err))
	}
	if plan != known {
		known, count = plan, 0
	}
	count++
	trace(dir, effect)
	if count != at {
		return nil
	}
	if what == "kill" {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // wait for the signal
	}
	return errnos[what]
}

// Init returns the program that a test wants as the VM's init, or "".
func Init() string { return os.Getenv(InitEnv) }

// Boot returns the id of the boot that a test wants, or "".
func Boot() string { return os.Getenv(BootEnv) }

func trace(dir, effect string) {
	f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint(TraceFile, known)), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	fmt.Fprintln(f, effect)
}
