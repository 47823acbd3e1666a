// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
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

// missingParts looks for everything that is needed to format every filesystem, and
// returns an error for each part that is missing, by the part's name.
func (f *Formatter) missingParts() (parts []string, errs []error) {
	m, err := machineOf(runtime.GOARCH)
	if err != nil {
		return []string{runtime.GOARCH}, []error{err} // nothing else would help
	}
	note := func(part string, err error) {
		if err != nil {
			parts, errs = append(parts, part), append(errs, err)
		}
	}
	_, err = f.accel()
	note("accelerator", err)
	_, err = f.findQEMU(m)
	note("QEMU", err)
	_, err = f.findKernel(m)
	note("kernel", err)
	for _, name := range diskfs.Names() {
		fs, err := diskfs.Lookup(name)
		if err != nil {
			note(name, err)
			continue
		}
		for _, tool := range []string{fs.Mkfs, fs.Checker} {
			_, err := findTool(tool, fs.Package)
			note(tool, err)
		}
	}
	return parts, errs
}

// Conditions reports each part that this machine lacks to format every filesystem. They
// are [health.Degraded]: what was formatted before is still served.
func (f *Formatter) Conditions() []health.Condition {
	var found []health.Condition
	parts, errs := f.missingParts()
	for i, err := range errs {
		c := health.Condition{Code: health.FormatterUnavailable, Object: parts[i], Severity: health.Degraded, Text: err.Error()}
		if part := (*missingPart)(nil); errors.As(err, &part) {
			c.Text, c.Remedy = part.what.Error(), part.remedy
		}
		found = append(found, c)
	}
	return found
}
