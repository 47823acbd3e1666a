// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// What a plugin shows while it runs: its pages, its processes, its log.

// get reads a page of the plugin's HTTP endpoint.
func (p *plugin) get(path string) (int, string) {
	p.t.Helper()
	r, err := http.Get("http://" + p.web + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// metric sums a metric over its labels.
func (p *plugin) metric(name string) (sum float64) {
	p.t.Helper()
	_, page := p.get("/metrics")
	for line := range strings.Lines(page) {
		if rest, ok := strings.CutPrefix(line, name); ok && strings.ContainsAny(rest[:1], "{ ") {
			v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:len(line)-1], 64)
			if err != nil {
				p.t.Fatal(err)
			}
			sum += v
		}
	}
	return sum
}

// samples returns the lines of a metric, of all its labels.
func (p *plugin) samples(name string) (lines []string) {
	p.t.Helper()
	_, page := p.get("/metrics")
	for line := range strings.Lines(page) {
		if rest, ok := strings.CutPrefix(line, name); ok && strings.ContainsAny(rest[:1], "{ ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

const builds = "csi_disktemplate_template_build_duration_seconds_count"

// children lists the processes that the plugin started and that are still there; proc_pid_task(5).
func (p *plugin) children() (pids []int) {
	p.t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.PID()))
	if err != nil || lists == nil {
		p.t.Fatalf("no children files of %d (a kernel without CONFIG_PROC_CHILDREN?): %v", p.PID(), err)
	}
	for _, list := range lists {
		b, _ := os.ReadFile(list) // the thread may have ended
		for _, word := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(word)
			if err != nil {
				p.t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// waited returns the kernel's sums over all children that the plugin waited for: page faults and time; proc_pid_stat(5),
// fields 11, 13, 16 and 17.
func (p *plugin) waited() [4]string {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		p.t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // from field 3
	return [4]string{f[11-3], f[13-3], f[16-3], f[17-3]}
}

// vm waits until QEMU runs, and returns its pid.
func (p *plugin) vm() (pid int) {
	p.t.Helper()
	p.await("a VM", func() bool {
		for _, child := range p.children() {
			if cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child)); bytes.Contains(cmd, []byte("microvm")) {
				pid = child
			}
		}
		return pid != 0
	})
	return pid
}

// gone waits until a process has ended.
func gone(t *testing.T, pid int) {
	t.Helper()
	testenv.Eventually(t, fmt.Sprintf("the end of process %d", pid), func() bool {
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	})
}

// logbook is the file that a plugin logs to. A call's line is in it before the call's answer arrives.
type logbook struct {
	t    *testing.T
	path string
}

func (l logbook) String() string {
	l.t.Helper()
	b, err := os.ReadFile(l.path)
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

// lines returns the lines that contain every one of the words.
func (l logbook) lines(words ...string) (found []string) {
	for line := range strings.Lines(l.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			found = append(found, line)
		}
	}
	return found
}

// loud returns the log without the calls that csi-sanity makes a thousand times.
func (l logbook) loud() string {
	var b strings.Builder
	for line := range strings.Lines(l.String()) {
		if !strings.Contains(line, "Capabilities") {
			b.WriteString(line)
		}
	}
	return b.String()
}
