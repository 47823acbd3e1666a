// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Bounds of what the plugin's process takes. Measured with the kernel of the image: 34 MiB. The
// first build on a node also unpacks the kernel. Some kernels take 128 MiB for that: see
// maxWindow in pkg/vmformat/unpack.go.
const (
	mostMemory      = 96 << 20
	mostFirstMemory = mostMemory + 128<<20
)

// memoryPlugin is a plugin whose memory is measured.
type memoryPlugin struct {
	t testing.TB
	harness.Node
	*harness.Plugin
	client *harness.Client
	built  int
}

// startPlugin starts the product, as users get it: without the race detector, which takes
// memory for itself.
func startPlugin(t testing.TB, n harness.Node, binary string) *memoryPlugin {
	t.Helper()
	p := harnesstest.Launch(t, n, harness.Command{Binary: binary, ID: "node1", Flags: []string{"--accel", "tcg"}})
	t.Cleanup(func() { p.Kill() })
	c := harnesstest.Connect(t, n)
	if err := p.Serves(t.Context(), c); err != nil {
		t.Fatalf("%v; the end of its log:\n%s", err, p.Tail())
	}
	return &memoryPlugin{t: t, Node: n, Plugin: p, client: c}
}

// build has templates built at once, one of each filesystem, by volumes that come and go.
func (p *memoryPlugin) build(filesystems ...string) {
	p.t.Helper()
	var g errgroup.Group
	for _, fs := range filesystems {
		p.built++
		uid := fmt.Sprintf("uid%d", p.built)
		v := p.Inline("volume-"+uid, fs, harness.Pod{Namespace: "test", Name: uid, UID: uid}, map[string]string{"size": fmt.Sprintf("%dMi", 300+p.built)})
		g.Go(func() error {
			if err := v.MakeDirs(); err != nil {
				return err
			}
			return errors.Join(p.client.Publish(p.t.Context(), v), p.client.Unpublish(p.t.Context(), v))
		})
	}
	if err := g.Wait(); err != nil {
		p.t.Fatal(err)
	}
}

// memory reads a field of /proc/PID/status, in bytes: see proc_pid_status(5).
func (p *memoryPlugin) memory(field string) int64 {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		p.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + field + `:\s+(\d+) kB$`).FindSubmatch(b)
	if m == nil {
		p.t.Fatalf("no %s in\n%s", field, b)
	}
	kib, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return kib << 10
}

// memoryRequest is what the plugin's manifest asks for.
func memoryRequest(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("../../deploy/kubernetes/base/plugin.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`requests: {cpu: \w+, memory: (\w+)}`).FindSubmatch(b)
	if m == nil {
		t.Fatal("the manifest requests no memory")
	}
	q, err := resource.ParseQuantity(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return q.Value()
}

// TestMemory builds a template of each filesystem, on a node where the kernel is still to be
// unpacked, and on one where it was. The kernel, the programs and the archive for the VM, some
// 100 MiB, may not pass through the plugin's own memory as a whole. After the builds it takes no
// more than its manifest asks for.
func TestMemory(t *testing.T) {
	n := harnesstest.New(t, testenv.XFS.Mount(t, 4<<30))
	for i, most := range []int64{mostFirstMemory, mostMemory} {
		p := startPlugin(t, n, testenv.Binary(t))
		p.built = 10 * i // other sizes, and so other templates
		for _, fs := range diskfs.Names() {
			p.build(fs)
		}
		peak, after, request := p.memory("VmHWM"), p.memory("VmRSS"), memoryRequest(t)
		t.Logf("resident: at most %s, after the builds %s; the manifest requests %s", size.Format(peak), size.Format(after), size.Format(request))
		if peak > most {
			t.Errorf("start %d: the plugin took %s at its peak, want at most %s", i+1, size.Format(peak), size.Format(most))
		}
		if after > request {
			t.Errorf("start %d: the plugin takes %s after it has built templates, and its manifest requests %s", i+1, size.Format(after), size.Format(request))
		}
		if err := p.Stop(10 * time.Second); err != nil {
			t.Fatalf("%v; the end of its log:\n%s", err, p.Tail())
		}
	}
}

// cgroup is a control group with a memory controller, of either version: see
// Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
type cgroup struct {
	t           testing.TB
	dir         string
	usage, peak string // names of files
}

// newCgroup makes a group, which must be without processes when the test ends.
func newCgroup(t testing.TB) cgroup {
	t.Helper()
	c := cgroup{t, "/sys/fs/cgroup/memory", "memory.usage_in_bytes", "memory.max_usage_in_bytes"}
	if _, err := os.Stat(c.dir); err != nil {
		c = cgroup{t, "/sys/fs/cgroup", "memory.current", "memory.peak"}
	}
	dir, err := os.MkdirTemp(c.dir, "csi-disktemplate-test-")
	if err != nil {
		t.Fatal(err)
	}
	c.dir = dir
	t.Cleanup(func() { testenv.Eventually(t, "the group to be empty", func() bool { return os.Remove(c.dir) == nil }) })
	return c
}

// wrap returns a program that runs another one in the group.
func (c cgroup) wrap(binary string) string {
	c.t.Helper()
	name := filepath.Join(testenv.Dir(c.t), "in-group")
	script := fmt.Sprintf("#!/bin/sh -e\necho $$ >%s/cgroup.procs\nexec %s \"$@\"\n", c.dir, binary)
	if err := os.WriteFile(name, []byte(script), 0o755); err != nil {
		c.t.Fatal(err)
	}
	return name
}

// read returns the content of one of the group's files, in MiB.
func (c cgroup) read(name string) float64 {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		c.t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return float64(n) / (1 << 20)
}

// BenchmarkMemory measures the memory of a plugin that has just started, after it has built a
// template of each filesystem, one after the other, and after it has built two at once. A
// container is charged for its group: the plugin's process, QEMU, the files in memory that QEMU
// boots from, and the page cache of what they read and wrote. The kernel takes the page cache
// back when memory gets short.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		group := newCgroup(b)
		p := startPlugin(b, harnesstest.New(b, testenv.XFS.Mount(b, 4<<30)), group.wrap(testenv.Binary(b)))
		time.Sleep(3 * time.Second) // the plugin reads the formatter's files meanwhile
		report := func(field, unit string) { b.ReportMetric(float64(p.memory(field))/(1<<20), unit) }
		report("VmRSS", "idle-MiB")
		b.ReportMetric(group.read(group.usage), "group-idle-MiB")
		for _, fs := range diskfs.Names() {
			p.build(fs)
		}
		report("VmHWM", "peak-MiB")
		report("VmRSS", "after-MiB")
		b.ReportMetric(group.read(group.peak), "group-peak-MiB")
		b.ReportMetric(group.read(group.usage), "group-after-MiB")
		p.build("btrfs", "xfs")
		report("VmHWM", "peak-of-2-MiB")
		b.ReportMetric(group.read(group.peak), "group-peak-of-2-MiB")
	}
}
