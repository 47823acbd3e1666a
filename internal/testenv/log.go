// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"bytes"
	"errors"
	"flag"
	"testing"

	"k8s.io/klog/v2"
)

// CaptureLog makes klog write to a buffer, at a level of -v, until the test ends. It needs no root.
func CaptureLog(t testing.TB, v string) *bytes.Buffer {
	t.Helper()
	state := klog.CaptureState()
	t.Cleanup(state.Restore)
	var f flag.FlagSet
	klog.InitFlags(&f)
	// one_output: a line is not repeated in the log of each lower severity.
	if err := errors.Join(f.Set("logtostderr", "false"), f.Set("one_output", "true"), f.Set("v", v)); err != nil {
		t.Fatal(err)
	}
	out := new(bytes.Buffer)
	klog.SetOutput(out)
	return out
}
