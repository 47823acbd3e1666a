// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
)

// missingPart is an [ErrUnavailable]: one part of the VM that this machine lacks.
type missingPart struct {
	what   error  // what is missing, and why
	remedy string // what to do; empty if what says it
}

// missing returns a missingPart. format and args are those of [fmt.Errorf].
func missing(remedy, format string, args ...any) error {
	return &missingPart{fmt.Errorf(format, args...), remedy}
}

func (p *missingPart) Error() string {
	if p.remedy == "" {
		return fmt.Sprintf("%v: %v", ErrUnavailable, p.what)
	}
	return fmt.Sprintf("%v: %v; %s", ErrUnavailable, p.what, p.remedy)
}

func (p *missingPart) Unwrap() []error { return []error{ErrUnavailable, p.what} }

// needed is one part of the VM, by the name that conditions have for it.
type needed struct {
	name string
	find func() (path string, err error)
}

// programs are the parts that make and check filesystems.
func programs() (parts []needed) {
	for _, name := range diskfs.Names() {
		fs, err := diskfs.Lookup(name)
		if err != nil {
			continue
		}
		for _, tool := range []string{fs.Mkfs, fs.Checker} {
			parts = append(parts, needed{tool, func() (string, error) { return findTool(tool, fs.Package) }})
		}
	}
	return parts
}

// Requirements are the parts of the VM: everything that is needed to format every filesystem.
func (f *Formatter) Requirements() []health.Requirement {
	m, err := machineOf(runtime.GOARCH)
	if err != nil { // nothing else would help
		return []health.Requirement{f.requirement("accelerator", needed{runtime.GOARCH, func() (string, error) { return "", err }})}
	}
	accelerator := health.Requirement{Name: "accelerator", Look: f.acceleratorConditions, Good: f.describeAccelerator}
	qemu := needed{"QEMU", func() (string, error) { return f.findQEMU(m) }}
	kernel := needed{"kernel", func() (string, error) {
		k, err := f.findKernel(m)
		return k.path, err
	}}
	return []health.Requirement{accelerator, f.requirement("qemu", qemu), f.requirement("vm-kernel", kernel), f.requirement("mkfs", programs()...)}
}

// requirement is met if all of its parts are there.
func (f *Formatter) requirement(name string, parts ...needed) health.Requirement {
	return health.Requirement{
		Name: name,
		Look: func() (found []health.Condition) {
			for _, p := range parts {
				if _, err := p.find(); err != nil {
					found = append(found, lacking(p.name, err))
				}
			}
			return found
		},
		Good: func() string {
			var paths []string
			for _, p := range parts {
				if path, err := p.find(); err == nil {
					paths = append(paths, path)
				}
			}
			return strings.Join(paths, ", ")
		},
	}
}

// lacking is a part that is missing. What was formatted before is still served.
func lacking(name string, err error) health.Condition {
	c := health.Condition{Code: health.FormatterUnavailable, Object: name, Severity: health.Degraded, Text: err.Error()}
	if part := (*missingPart)(nil); errors.As(err, &part) {
		c.Text, c.Remedy = part.what.Error(), part.remedy
	}
	c.Cost = "volumes whose template is not in the pool yet are refused"
	return c
}

func (f *Formatter) acceleratorConditions() []health.Condition {
	accel, whyNotKVM, err := f.Accelerator()
	switch {
	case err != nil:
		return []health.Condition{lacking("accelerator", err)}
	case accel == AccelTCG && whyNotKVM != nil:
		return []health.Condition{{
			Code: health.NoKVM, Severity: health.Limited, StillReady: true,
			Text: whyNotKVM.Error(), Cost: "the formatting VM is emulated (TCG), and each new template takes seconds longer",
			Remedy: "use a machine with hardware virtualization, in a VM nested virtualization, and give the container " + kvm.Device + ", as privileged ones have it; " +
				"or prewarm the templates (--prewarm); --accel=tcg says that emulation is meant",
		}}
	}
	return nil
}

func (f *Formatter) describeAccelerator() string {
	if accel, _, err := f.Accelerator(); err != nil || accel == AccelKVM {
		return "KVM runs guests"
	}
	return "the formatting VM is emulated (TCG), as --accel=tcg asks for"
}

// Conditions are those of all [Formatter.Requirements].
func (f *Formatter) Conditions() []health.Condition { return health.Look(f.Requirements()) }
