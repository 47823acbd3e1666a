// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// vmFlags say what the formatting VM is made of.
type vmFlags struct {
	accel, kernel, qemu string
	timeout             time.Duration
}

func (v *vmFlags) add(f *pflag.FlagSet) {
	f.StringVar(&v.accel, "accel", string(vmformat.AccelAuto), "accelerator of the formatting VM: auto (KVM where it works, else TCG), kvm, or tcg")
	f.StringVar(&v.kernel, "kernel", "", "kernel the formatting VM boots, a vmlinuz or vmlinux (default: the newest in /boot that has its modules in /lib/modules)")
	f.StringVar(&v.qemu, "qemu", "", "QEMU's binary (default: qemu-system-x86_64 on PATH)")
	f.DurationVar(&v.timeout, "format-timeout", vmformat.DefaultTimeout, "wall clock limit of one formatting VM")
}

// validate checks what can be checked without looking at the machine.
func (v *vmFlags) validate() error {
	switch a := vmformat.Accel(v.accel); a {
	case vmformat.AccelAuto, vmformat.AccelKVM, vmformat.AccelTCG:
	default:
		return fmt.Errorf("--accel %q: must be one of %s, %s, %s", a, vmformat.AccelAuto, vmformat.AccelKVM, vmformat.AccelTCG)
	}
	if v.timeout <= 0 {
		return fmt.Errorf("--format-timeout %s: must be more than 0", v.timeout)
	}
	return nil
}

func (v *vmFlags) formatter(cacheDir string) (*vmformat.Formatter, error) {
	return vmformat.New(vmformat.Config{
		Init: failpoint.Init(), QEMU: v.qemu, Kernel: v.kernel, Accel: vmformat.Accel(v.accel), Timeout: v.timeout, CacheDir: cacheDir,
	})
}
