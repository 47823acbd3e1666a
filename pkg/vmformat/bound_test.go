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
)

// TestBoundByKernel runs TestBound of pkg/volume in a VM: the kernel of the image has project
// quotas for xfs, whatever this machine's kernel has. The VM is the one that formats, with the
// test as its init, and with the driver of loop devices.
func TestBoundByKernel(t *testing.T) {
	testenv.Root(t)
	dir := testenv.Dir(t)
	f := newFormatter(t, func(c *Config) { c.Init = volumeTests(t, dir) })
	r, err := f.gather("xfs")
	if err != nil {
		t.Fatal(err)
	}
	loop, err := r.kernel.load([]string{"loop"})
	if err != nil {
		t.Fatal(err)
	}
	modules := slices.Concat(r.setup.Modules, r.setup.Transports)
	for _, name := range loop {
		modules = append(modules, r.addModule(name, ""))
	}
	list := filepath.Join(dir, "order")
	if err := os.WriteFile(list, []byte(strings.Join(modules, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	r.files[modulesDir+"order"] = file{mode: cpio.S_IFREG | 0o444, open: func() (*os.File, error) { return os.Open(list) }}
	v, err := f.plan(r, AccelTCG)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.close)
	v.memory, v.timeout = 512, 3*DefaultTimeout // it does more than format
	disk := image(t, dir)
	if err := disk.Truncate(4 << 30); err != nil {
		t.Fatal(err)
	}
	o := v.run(t.Context(), []*order{{file: disk}})
	said := strings.Join(o.console, "\n")
	t.Logf("%s, %v:\n%s", o.elapsed, o.exit, said)
	if !strings.Contains(said, "--- PASS: TestBound/inline") || !strings.Contains(said, "tests ended with 0 <nil>") {
		t.Error("the test failed in the VM")
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
