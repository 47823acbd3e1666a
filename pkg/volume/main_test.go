// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// TestMain runs the tests. As the init of a VM it prepares that first, and runs the test that the
// kernel's command line names: see TestBoundByKernel and TestContextByKernel in pkg/vmformat.
func TestMain(m *testing.M) {
	if os.Getenv(moverEnv) != "" {
		fmt.Println(quota.SetProject(os.NewFile(3, "disk.img"), 0))
		os.Exit(1)
	}
	if !guest.IsInit() {
		os.Exit(m.Run())
	}
	err := prepareVM()
	code := 1
	if err == nil {
		os.Args = append(os.Args, "-test.v")
		code = m.Run()
	}
	fmt.Printf("tests ended with %d %v\n", code, err)
	syscall.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	os.Exit(1) // not reached
}

// prepareVM mounts what a node has, and makes the directory for tests on the disk.
func prepareVM() error {
	os.Setenv("PATH", "/bin")
	os.Setenv("LD_LIBRARY_PATH", guest.LibDir)
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := syscall.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("%s: %w", m[1], err)
		}
	}
	b, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(b)) {
		if err := loadModule(path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if err := loadPolicy(); err != nil {
		return err
	}
	disks, _ := filepath.Glob("/sys/block/vd*/serial")
	for _, name := range disks {
		serial, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(serial)) != guest.Disk(0) {
			continue
		}
		disk := "/dev/" + filepath.Base(filepath.Dir(name))
		if out, err := exec.Command("mkfs.xfs", "-q", disk).CombinedOutput(); err != nil {
			return fmt.Errorf("mkfs.xfs: %w: %s", err, out)
		}
		if err := os.MkdirAll("/var/tmp", 0o755); err != nil {
			return err
		}
		return syscall.Mount(disk, "/var/tmp", "xfs", 0, "prjquota")
	}
	return fmt.Errorf("there is no disk among %q", disks)
}

// loadPolicy loads the policy of SELinux, if the VM has one.
func loadPolicy() error {
	policy, err := os.ReadFile("/policy")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syscall.Mount("selinuxfs", "/sys/fs/selinux", "selinuxfs", 0, "")
	}
	if err == nil {
		err = os.WriteFile("/sys/fs/selinux/load", policy, 0) // in one piece: security/selinux/selinuxfs.c
	}
	if err != nil {
		return fmt.Errorf("loading the policy: %w", err)
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != syscall.EEXIST {
		return err
	}
	return nil
}
