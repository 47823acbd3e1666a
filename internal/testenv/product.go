// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Product runs the product to its end, which must come within a minute and a
// half. What it said is logged and returned, with the exit code.
func Product(t testing.TB, args ...string) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	return Finish(t, exec.CommandContext(ctx, Binary(t), args...))
}

// Finish runs a command to its end, likewise.
func Finish(t testing.TB, cmd *exec.Cmd) (code int, output string) {
	t.Helper()
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s\n%s", strings.Join(cmd.Args[1:], " "), cmd.ProcessState, b)
	return cmd.ProcessState.ExitCode(), string(b)
}
