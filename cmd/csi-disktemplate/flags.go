// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// parseSize reads the flag's value, a Kubernetes quantity, as bytes.
func parseSize(flag, value string) (int64, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return 0, fmt.Errorf("--%s %q is not a quantity (%w); write a number with a unit, as 512Mi or 20Gi", flag, value, err)
	}
	// Of what no int64 holds, Value returns the low bits: they may look harmless.
	if q.CmpInt64(math.MaxInt64) > 0 {
		return math.MaxInt64, nil
	}
	if q.CmpInt64(math.MinInt64) < 0 {
		return math.MinInt64, nil
	}
	return q.Value(), nil
}

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
		QEMU: v.qemu, Kernel: v.kernel, Accel: vmformat.Accel(v.accel), Timeout: v.timeout, CacheDir: cacheDir,
	})
}
