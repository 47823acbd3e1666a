// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// TestBoundByKernel runs TestBound of pkg/volume in a VM: the kernel of the image has project
// quotas for xfs, whatever this machine's kernel has.
func TestBoundByKernel(t *testing.T) {
	testenv.Root(t)
	said := runVolumeTest(t, volumeTest{name: "TestBound", filesystems: []string{"xfs"}})
	if !strings.Contains(said, "--- PASS: TestBound/inline") {
		t.Error("the test failed in the VM")
	}
}

// volumeTest is a test of pkg/volume that needs another kernel than this machine's.
type volumeTest struct {
	name        string
	filesystems []string          // that the VM can make and mount; the first is that of its disk
	files       map[string]string // more files, by their path in the VM, and where they are here
	cmdline     []string          // more words of the kernel's command line
}

// runVolumeTest runs a test of pkg/volume in a VM, and returns what it printed. The VM is the one
// that formats, with the test as its init, and with the driver of loop devices.
func runVolumeTest(t *testing.T, test volumeTest) string {
	t.Helper()
	dir := testenv.Dir(t)
	f := newFormatter(t, func(c *Config) { c.Init = volumeTests(t, dir) })
	r, err := f.gather(test.filesystems[0])
	if err != nil {
		t.Fatal(err)
	}
	modules := slices.Concat(r.setup.Modules, r.setup.Transports)
	more, err := r.kernel.load(slices.Concat([]string{"loop"}, test.filesystems))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range more {
		modules = append(modules, r.addModule(name, ""))
	}
	list := filepath.Join(dir, "order")
	if err := os.WriteFile(list, []byte(strings.Join(modules, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	addFile(r, modulesDir+"order", list)
	for at, from := range test.files {
		addFile(r, at, from)
	}
	for _, name := range test.filesystems {
		addMkfs(t, r, name)
	}
	v, err := f.plan(r, AccelTCG)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.close)
	v.memory, v.timeout = 512, 3*DefaultTimeout // it does more than format
	words := v.accel.cmdline()
	v.accel.cmdline = func() []string { // what is behind "--" is for init
		return slices.Concat(words, test.cmdline, []string{"--", "-test.run=^" + test.name + "$"})
	}
	disk := image(t, dir)
	if err := disk.Truncate(4 << 30); err != nil {
		t.Fatal(err)
	}
	o := v.run(t.Context(), []*order{{file: disk}})
	said := strings.Join(o.console, "\n")
	t.Logf("%s, %v:\n%s", o.elapsed, o.exit, said)
	if !strings.Contains(said, "tests ended with 0 <nil>") {
		t.Error("the test failed in the VM")
	}
	return said
}

func addFile(r *recipe, at, from string) {
	r.files[at] = file{mode: cpio.S_IFREG | 0o444, open: func() (*os.File, error) { return os.Open(from) }}
}

func addMkfs(t *testing.T, r *recipe, filesystem string) {
	t.Helper()
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		t.Fatal(err)
	}
	from, err := findTool(fs.Mkfs, fs.Package)
	if err == nil {
		err = addProgram(r.files, "/bin/"+fs.Mkfs, from)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// volumeTests builds the tests of pkg/volume as a program that needs no libraries, with failpoints.
func volumeTests(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(dir, "init")
	cmd := exec.Command("go", "test", "-c", "-tags", "system,failpoints", "-trimpath", "-o", program, "../volume")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}
