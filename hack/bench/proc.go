// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// userHZ is the unit of times in /proc/PID/stat: sysconf(_SC_CLK_TCK), which is 100 on every Linux of today.
const userHZ = 100

// childrenTime is the processor time of a process's children that were waited for: cutime and cstime of
// proc_pid_stat(5).
func childrenTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(b), ") ") // the name may have spaces
	fields := strings.Fields(after)
	if len(fields) < 15 {
		return 0, fmt.Errorf("/proc/%d/stat has too few fields", pid)
	}
	var ticks int64
	for _, field := range fields[13:15] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / userHZ, nil
}

// idle waits until the plugin has had no child for a while. It may build templates after it has answered.
func (d *bed) idle(ctx context.Context) error {
	const quiet, patience = 500 * time.Millisecond, 3 * time.Minute
	end, since := time.Now().Add(patience), time.Now()
	for ; time.Since(since) < quiet; time.Sleep(50 * time.Millisecond) {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.PID()))
		if err != nil {
			return err
		}
		for _, list := range lists {
			if b, err := os.ReadFile(list); err == nil && len(b) > 0 {
				since = time.Now()
			}
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("the plugin still has children after %s: %w", patience, errors.Join(ctx.Err(), errors.New(d.Tail())))
		}
	}
	return nil
}

// The kernel's process events: include/uapi/linux/connector.h and cn_proc.h.
const (
	cnIdxProc, cnValProc = 1, 1
	procCNMcastListen    = 1
	procEventFork        = 1

	nlHeader, cnHeader, eventHeader = 16, 20, 16
)

// watchProcesses counts the processes that a process starts from now on, and those that they start. The returned
// function ends the watch. Threads do not count.
func watchProcesses(pid int) (count func() int, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnIdxProc})
	if err == nil {
		// Without a message for so long, a receive returns, and sees whether it is to end.
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000})
	}
	if err == nil {
		err = unix.Send(fd, listenMessage(), 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listening to process events: %w", err)
	}
	done, found := make(chan struct{}), 0
	var g sync.WaitGroup
	g.Go(func() {
		defer unix.Close(fd)
		family := map[int32]bool{int32(pid): true}
		for buf := make([]byte, 4096); ; {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil {
				found += forks(buf[:n], family)
				continue
			}
			select {
			case <-done:
				return
			default:
				if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
					return
				}
			}
		}
	})
	return func() int {
		close(done)
		g.Wait()
		return found
	}, nil
}

// listenMessage asks for the events: a netlink header, a connector's header, and PROC_CN_MCAST_LISTEN.
func listenMessage() []byte {
	var m bytes.Buffer
	ne := binary.NativeEndian
	put := func(v any) { binary.Write(&m, ne, v) }
	put(uint32(nlHeader + cnHeader + 4))
	put([]uint16{unix.NLMSG_DONE, 0})
	put([]uint32{0, uint32(os.Getpid())})
	put([]uint32{cnIdxProc, cnValProc, 0, 0})
	put([]uint16{4, 0})
	put(uint32(procCNMcastListen))
	return m.Bytes()
}

// forks counts new processes whose parent is in the family, and adds them to it.
func forks(m []byte, family map[int32]bool) int {
	ne := binary.NativeEndian
	if len(m) < nlHeader+cnHeader+eventHeader+16 {
		return 0
	}
	event := m[nlHeader+cnHeader:]
	if ne.Uint32(event) != procEventFork {
		return 0
	}
	field := func(i int) int32 { return int32(ne.Uint32(event[eventHeader+4*i:])) }
	parentTGID, child, childTGID := field(1), field(2), field(3)
	if child != childTGID || !family[parentTGID] {
		return 0
	}
	family[child] = true
	return 1
}
