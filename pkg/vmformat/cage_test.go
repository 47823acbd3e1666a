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

// process is a running or stopped process, as this machine's /proc shows it.
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

// links returns the targets of the links in a directory, by name.
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

// field returns the value of a line "name:\tvalue" of a file.
func field(file, name string) string {
	for line := range strings.Lines(file) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	return "missing"
}

// TestCage looks from outside at a QEMU in the middle of a format: its user, its limits, and
// its share of the node. The format then goes on and succeeds.
func TestCage(t *testing.T) {
	v, template := broken(t, nil, nil)
	looked := false
	o := runOne(t.Context(), v, template, func(p guest.Progress) {
		if p.Stage != guest.StageMkfs {
			return
		}
		looked = true
		qemu := process{t, findProcess(v.nonce)}
		// It is stopped while the test looks.
		if err := syscall.Kill(qemu.pid, syscall.SIGSTOP); err != nil {
			t.Error(err)
			return
		}
		defer syscall.Kill(qemu.pid, syscall.SIGCONT)
		for name, look := range map[string]func(*testing.T, process, *vm, string){
			"nobody": isNobody, "bounded": isBounded, "files": hasItsFiles, "mounts": hasItsMounts, "namespaces": hasItsNamespaces,
		} {
			t.Run(name, func(t *testing.T) { look(t, process{t, qemu.pid}, v, template.file.Name()) })
		}
	})
	if err := o.judge(); err != nil || !looked {
		t.Errorf("looked at QEMU: %v; the format then returned %v", looked, err)
	}
	if pid := findProcess(v.nonce); pid > 0 {
		t.Errorf("QEMU %d is still running", pid)
	}
}

func isNobody(t *testing.T, qemu process, v *vm, _ string) {
	four := strings.TrimSpace(strings.Repeat(strconv.Itoa(qemuUID)+" ", 4)) // real, effective, saved, filesystem
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", qemu.pid))
	if err != nil || len(tasks) < 2 { // the main thread and the guest's processor
		t.Fatalf("QEMU has the threads %q: %v", tasks, err)
	}
	for _, task := range tasks {
		status := qemu.read(filepath.Join("task", filepath.Base(task), "status"))
		for name, want := range map[string]string{
			"Uid": four, "Gid": four, "Groups": "",
			"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapAmb": "0000000000000000",
			"NoNewPrivs": "1", "Seccomp": "2", // a filter
		} {
			if got := field(status, name); got != want {
				t.Errorf("thread %s: %s is %q, want %q", filepath.Base(task), name, got, want)
			}
		}
	}
}

func isBounded(t *testing.T, qemu process, v *vm, _ string) {
	limits := qemu.read("limits")
	for name, want := range map[string]int64{
		"Max address space": qemuAddressSpace, "Max cpu time": int64(2 * v.timeout.Seconds()), "Max open files": qemuFiles, "Max core file size": 0,
	} {
		if ok, err := regexp.MatchString(fmt.Sprintf(`(?m)^%s +%d +%[2]d `, name, want), limits); err != nil || !ok {
			t.Errorf("%s is not %d in:\n%s", name, want, limits)
		}
	}
	status := qemu.read("status")
	peak, err := strconv.ParseInt(strings.TrimSuffix(field(status, "VmPeak"), " kB"), 10, 64)
	if err != nil || peak<<10 > qemuAddressSpace*3/4 {
		t.Errorf("VmPeak is %d kB, want at most three quarters of the limit: %v", peak, err)
	}
	t.Logf("VmPeak %s, VmHWM %s, %d descriptors", field(status, "VmPeak"), field(status, "VmHWM"), len(qemu.links("fd")))
}

// hasItsFiles checks that QEMU has the template and the control disk in memory open, and no other
// file of the node.
func hasItsFiles(t *testing.T, qemu process, _ *vm, template string) {
	have := map[string]int{}
	for fd, to := range qemu.links("fd") {
		kind := to
		if to != template { // socket:[123], pipe:[123], anon_inode:[eventfd], /memfd:control (deleted)
			kind, _, _ = strings.Cut(to, ":")
		}
		have[kind]++
		switch kind {
		case template, "/memfd", "socket", "pipe", "anon_inode", os.DevNull:
		default:
			t.Errorf("QEMU has descriptor %s open on %s", fd, to)
		}
	}
	t.Log(have)
	if have["socket"] != 1 { // QMP
		t.Errorf("QEMU has %d sockets, want 1", have["socket"])
	}
	if have[template] == 0 || have["/memfd"] == 0 {
		t.Error("the template or the control disk is not open: the test looked at another process")
	}
}

// hasItsMounts checks that QEMU sees what its cage binds, read-only, and nothing else.
func hasItsMounts(t *testing.T, qemu process, v *vm, _ string) {
	want := []string{"/"}
	for at := range v.cageSpec().Binds {
		want = append(want, at)
	}
	var have []string
	for line := range strings.Lines(qemu.read("mountinfo")) {
		f := strings.Fields(line)
		have = append(have, f[4])
		options := strings.Split(f[5], ",")
		if !slices.Contains(options, "ro") || !slices.Contains(options, "nosuid") {
			t.Errorf("%s is mounted with %s, want ro and nosuid", f[4], f[5])
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(have, want) {
		t.Errorf("mounts at %q, want %q", have, want)
	}
}

// hasItsNamespaces checks that QEMU shares no namespace with this process, and has no network
// device but an idle loopback.
func hasItsNamespaces(t *testing.T, qemu process, _ *vm, _ string) {
	ours := process{t, os.Getpid()}.links("ns")
	theirs := qemu.links("ns")
	for _, name := range []string{"mnt", "net", "ipc", "uts", "pid"} {
		if theirs[name] == "" || theirs[name] == ours[name] {
			t.Errorf("QEMU's namespace %s is %q, this process has %q", name, theirs[name], ours[name])
		}
	}
	if devices := strings.Count(qemu.read("net/dev"), ":"); devices != 1 {
		t.Errorf("%d network devices, want 1:\n%s", devices, qemu.read("net/dev"))
	}
	if got := field(qemu.read("status"), "NSpid"); !strings.HasSuffix(got, " 1") {
		t.Errorf("QEMU's process IDs are %s, want 1 in its own namespace", got)
	}
}
