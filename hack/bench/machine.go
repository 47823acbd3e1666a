// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine describes where a run was, and of what.
type machine struct {
	CPU       string `json:"cpu"`
	CPUs      int    `json:"cpus"`
	MemoryMiB int64  `json:"memoryMiB"`
	Kernel    string `json:"kernel"`
	OS        string `json:"os"`
	Disk      string `json:"disk"` // the filesystem that holds the disk pools
	// Others is the share of the processors' time that other programs took during the run, and the kernel's threads.
	Others   float64  `json:"others"`
	Accel    string   `json:"virtualised"`
	Programs []string `json:"programs"`
	Plugin   string   `json:"plugin"` // what it says about itself
	Commit   string   `json:"commit"`
	Command  []string `json:"command"`
	Seed     uint64   `json:"seed"`
	Date     string   `json:"date"`
	Seconds  int      `json:"seconds"` // how long the run took
}

// describe asks the machine about itself. What it does not tell stays empty.
func (b *bench) describe() machine {
	var u unix.Utsname
	unix.Uname(&u)
	var si unix.Sysinfo_t
	unix.Sysinfo(&si)
	m := machine{
		CPU: field("/proc/cpuinfo", `(?m)^model name\s*:\s*(.+)$`), CPUs: runtime.NumCPU(), MemoryMiB: int64(si.Totalram) * int64(si.Unit) >> 20,
		Kernel: unix.ByteSliceToString(u.Release[:]), OS: strings.Trim(field("/etc/os-release", `(?m)^PRETTY_NAME=(.+)$`), `"`),
		Disk:   firstLine("findmnt", "-n", "-o", "SOURCE,FSTYPE,OPTIONS", "--target", b.o.dir),
		Others: b.others(),
		Accel:  "no",
		Plugin: firstLine(b.o.binary, "--version"), Commit: firstLine("git", "describe", "--always", "--dirty"),
		Command: os.Args[1:], Seed: b.o.seed, Date: b.began.UTC().Format(time.RFC3339), Seconds: int(time.Since(b.began).Seconds()),
	}
	if strings.Contains(field("/proc/cpuinfo", `(?m)^flags\s*:(.+)$`), " hypervisor") {
		m.Accel = "yes"
	}
	for _, program := range [][]string{{"qemu-system-x86_64", "--version"}, {"mkfs.ext4", "-V"}, {"mkfs.xfs", "-V"}, {"mkfs.btrfs", "--version"}, {"losetup", "--version"}, {"fio", "--version"}, {"git", "--version"}} {
		if line := firstLine(program...); line != "" {
			m.Programs = append(m.Programs, line)
		}
	}
	if dir, err := postgresDir(); err == nil {
		m.Programs = append(m.Programs, firstLine(filepath.Join(dir, "postgres"), "--version"))
	}
	return m
}

// others is the share of the processors' time since the run began that this process and its children did not use, nor was
// idle: /proc/stat, in proc_stat(5). A child counts once it was waited for.
func (b *bench) others() float64 {
	busy, all := ticks()
	busy, all = busy-b.busyTicks, all-b.allTicks
	var own time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		unix.Getrusage(who, &u)
		own += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return max(0, busy-own.Seconds()*userHZ) / max(1, all)
}

// ticks are the processors' times since the machine has booted: without what was idle, and with it.
func ticks() (busy, all float64) {
	for i, s := range strings.Fields(field("/proc/stat", `^cpu\s+(.*)`)) {
		n, _ := strconv.ParseFloat(s, 64)
		if i < 8 { // the rest is part of the first
			all += n
			if i != 3 && i != 4 { // idle, iowait
				busy += n
			}
		}
	}
	return busy, all
}

// field is what a pattern finds in a file.
func field(path, pattern string) string {
	b, _ := os.ReadFile(path)
	if m := regexp.MustCompile(pattern).FindSubmatch(b); m != nil {
		return strings.TrimSpace(string(m[1]))
	}
	return ""
}

func firstLine(line ...string) string {
	out, err := exec.Command(line[0], line[1:]...).CombinedOutput()
	if err != nil {
		return ""
	}
	s := bufio.NewScanner(bytes.NewReader(out))
	s.Scan()
	return strings.TrimSpace(s.Text())
}

// cpuKHz is the processor's clock rate: an emulated machine without a timer must be told.
func cpuKHz() int {
	mhz, err := strconv.ParseFloat(field("/proc/cpuinfo", `(?m)^cpu MHz\s*:\s*(\S+)`), 64)
	if err != nil {
		return 2_000_000
	}
	return int(mhz) * 1000
}

func (m machine) String() string {
	return fmt.Sprintf("%s, %d processors (virtual machine: %s), %d MiB of memory, Linux %s, %s", m.CPU, m.CPUs, m.Accel, m.MemoryMiB, m.Kernel, m.OS)
}
