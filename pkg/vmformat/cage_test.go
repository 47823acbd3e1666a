// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// process is one that runs, or stands still, as /proc of the machine shows it.
type process struct {
	t   *testing.T
	pid int
}

func (p process) read(name string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid), name))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// links are the targets of the links in a directory.
func (p process) links(name string) map[string]string {
	p.t.Helper()
	dir := filepath.Join("/proc", strconv.Itoa(p.pid), name)
	entries, err := os.ReadDir(dir)
	if err != nil {
		p.t.Fatal(err)
	}
	links := map[string]string{}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			p.t.Fatal(err)
		}
		links[e.Name()] = to
	}
	return links
}

// field is one of the lines "name:\tvalue" of a file.
func field(file, name string) string {
	for line := range strings.Lines(file) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	return "missing"
}

// TestCage looks at a QEMU, from the machine, in the middle of a format, which then
// goes on and succeeds: what it is, what it may take, and what it has of the node.
func TestCage(t *testing.T) {
	m, template := broken(t, nil, nil)
	looked := false
	o := m.run(t.Context(), template, func(stage guest.Stage) {
		if stage != guest.StageMkfs {
			return
		}
		looked = true
		qemu := process{t, findProcess(m.nonce)}
		// It stands still while it is looked at.
		if err := syscall.Kill(qemu.pid, syscall.SIGSTOP); err != nil {
			t.Error(err)
			return
		}
		defer syscall.Kill(qemu.pid, syscall.SIGCONT)
		for name, look := range map[string]func(*testing.T, process, *machine, string){
			"nobody": isNobody, "bounded": isBounded, "files": hasItsFiles, "mounts": hasItsMounts, "namespaces": hasItsNamespaces,
		} {
			t.Run(name, func(t *testing.T) { look(t, process{t, qemu.pid}, m, template.Name()) })
		}
	})
	if err := o.judge(); err != nil || !looked {
		t.Errorf("looked at: %v, and then: %v", looked, err)
	}
	if pid := findProcess(m.nonce); pid > 0 {
		t.Errorf("QEMU %d still runs", pid)
	}
}

func isNobody(t *testing.T, qemu process, m *machine, _ string) {
	four := strings.TrimSpace(strings.Repeat(strconv.Itoa(int(m.uid))+" ", 4)) // real, effective, saved, filesystem
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", qemu.pid))
	if err != nil || len(tasks) < 2 { // the guest's processor is one
		t.Fatalf("threads: %v %v", tasks, err)
	}
	for _, task := range tasks {
		status := qemu.read(filepath.Join("task", filepath.Base(task), "status"))
		for name, want := range map[string]string{
			"Uid": four, "Gid": four, "Groups": "",
			"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
			"NoNewPrivs": "1", "Seccomp": "2", // a filter
		} {
			if got := field(status, name); got != want {
				t.Errorf("thread %s: %s is %q, not %q", filepath.Base(task), name, got, want)
			}
		}
	}
}

func isBounded(t *testing.T, qemu process, m *machine, _ string) {
	limits := qemu.read("limits")
	for name, want := range map[string]int64{
		"Max address space": qemuAddressSpace, "Max cpu time": int64(2 * m.timeout.Seconds()), "Max open files": qemuFiles, "Max core file size": 0,
	} {
		if ok, err := regexp.MatchString(fmt.Sprintf(`(?m)^%s +%d +%[2]d `, name, want), limits); err != nil || !ok {
			t.Errorf("%s is not %d in\n%s", name, want, limits)
		}
	}
	status := qemu.read("status")
	peak, err := strconv.ParseInt(strings.TrimSuffix(field(status, "VmPeak"), " kB"), 10, 64)
	if err != nil || peak<<10 > qemuAddressSpace*3/4 {
		t.Errorf("VmPeak is %d kB, which leaves little room: %v", peak, err)
	}
	t.Logf("VmPeak %s, VmHWM %s, %d descriptors", field(status, "VmPeak"), field(status, "VmHWM"), len(qemu.links("fd")))
}

// hasItsFiles: of the node's files it has the template, and the verdict in memory.
func hasItsFiles(t *testing.T, qemu process, _ *machine, template string) {
	have := map[string]int{}
	for fd, to := range qemu.links("fd") {
		kind := to
		if to != template { // socket:[123], pipe:[123], anon_inode:[eventfd], /memfd:verdict (deleted)
			kind, _, _ = strings.Cut(to, ":")
		}
		have[kind]++
		switch kind {
		case template, "/memfd", "socket", "pipe", "anon_inode", os.DevNull:
		default:
			t.Errorf("descriptor %s is %s", fd, to)
		}
	}
	t.Log(have)
	if have["socket"] != 1 { // QMP
		t.Errorf("%d sockets", have["socket"])
	}
	if have[template] == 0 || have["/memfd"] == 0 {
		t.Error("template and verdict are not among them: nothing was looked at")
	}
}

// hasItsMounts: it sees what its cage binds, read-only, and nothing else.
func hasItsMounts(t *testing.T, qemu process, m *machine, _ string) {
	want := []string{"/"}
	for at := range m.cageSpec().Binds {
		want = append(want, at)
	}
	var have []string
	for line := range strings.Lines(qemu.read("mountinfo")) {
		f := strings.Fields(line)
		have = append(have, f[4])
		options := strings.Split(f[5], ",")
		if !slices.Contains(options, "ro") || !slices.Contains(options, "nosuid") {
			t.Errorf("%s is mounted %v", f[4], options)
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(have, want) {
		t.Errorf("mounts at %v, not %v", have, want)
	}
}

// hasItsNamespaces: none of the machine's, and no network but an idle loopback.
func hasItsNamespaces(t *testing.T, qemu process, _ *machine, _ string) {
	ours := process{t, os.Getpid()}.links("ns")
	theirs := qemu.links("ns")
	for _, name := range []string{"mnt", "net", "ipc", "uts", "pid"} {
		if theirs[name] == "" || theirs[name] == ours[name] {
			t.Errorf("its namespace %s is %q, ours %q", name, theirs[name], ours[name])
		}
	}
	if devices := strings.Count(qemu.read("net/dev"), ":"); devices != 1 {
		t.Errorf("network devices:\n%s", qemu.read("net/dev"))
	}
	if got := field(qemu.read("status"), "NSpid"); !strings.HasSuffix(got, " 1") {
		t.Errorf("its process IDs are %s", got)
	}
}
