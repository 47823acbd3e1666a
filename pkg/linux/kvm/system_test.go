// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package kvm

import (
	"errors"
	"os"
	"regexp"
	"testing"
	"time"
)

// TestUsable compares the verdict with the processor's flags. A machine where they differ
// is worth a look.
func TestUsable(t *testing.T) {
	start := time.Now()
	err := Usable()
	t.Logf("after %s: %v", time.Since(start), err)
	if err != nil && !errors.Is(err, ErrUnusable) {
		t.Errorf("the error is not ErrUnusable: %v", err)
	}
	cpuinfo, readErr := os.ReadFile("/proc/cpuinfo")
	if readErr != nil {
		t.Fatal(readErr)
	}
	hardware := regexp.MustCompile(`(?m)^(flags|Features).*\b(vmx|svm)\b`).Match(cpuinfo)
	if _, statErr := os.Stat(Device); statErr == nil && hardware != (err == nil) {
		t.Errorf("/proc/cpuinfo has vmx or svm: %v, and yet the trial says: %v", hardware, err)
	}
}
