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
// returns an error for each part that is missing.
func (f *Formatter) missingParts() []error {
	m, err := machineOf(runtime.GOARCH)
	if err != nil {
		return []error{err} // nothing else would help
	}
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	_, err = f.accel()
	note(err)
	_, err = f.findQEMU(m)
	note(err)
	_, err = f.findKernel(m)
	note(err)
	for _, name := range diskfs.Names() {
		fs, err := diskfs.Lookup(name)
		if err != nil {
			note(err)
			continue
		}
		for _, tool := range []string{fs.Mkfs, fs.Checker} {
			_, err := findTool(tool, fs.Package)
			note(err)
		}
	}
	return errs
}

// Conditions reports each part that this machine lacks to format every filesystem. They
// are [health.Degraded]: what was formatted before is still served.
func (f *Formatter) Conditions() []health.Condition {
	var found []health.Condition
	for _, err := range f.missingParts() {
		c := health.Condition{Code: "FormatterUnavailable", Severity: health.Degraded, Text: err.Error()}
		if part := (*missingPart)(nil); errors.As(err, &part) {
			c.Text, c.Remedy = part.what.Error(), part.remedy
		}
		found = append(found, c)
	}
	return found
}
