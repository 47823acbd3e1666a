// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package logs

import (
	"errors"
	"regexp"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestWarn compares a warning with what InfoS makes of the same values: only the severity may differ.
func TestWarn(t *testing.T) {
	out := testenv.CaptureLog(t, "0")
	pairs := []any{"volume", "v-1", "err", errors.New(`no "x"`), "took", 1500 * time.Millisecond, "count", 3, "done", true, "nothing", nil}
	klog.InfoS("As it is", pairs...)
	Warn("As it is", pairs...)
	klog.Flush()
	t.Log(out.String())
	m := regexp.MustCompile(`(?m)^([A-Z]).* (warn_test.go):\d+\] (.*)$`).FindAllStringSubmatch(out.String(), -1)
	if len(m) != 2 || m[0][1] != "I" || m[1][1] != "W" {
		t.Fatalf("the log is %s", out.String())
	}
	if got, want := m[1][3], m[0][3]; got != want {
		t.Errorf("a warning is\n%s\nand InfoS writes\n%s", got, want)
	}
}
