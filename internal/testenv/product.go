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

// Product runs the product to its end, for a minute and a half at most. It logs and
// returns the output, and returns the exit code.
func Product(t testing.TB, args ...string) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	return Finish(t, exec.CommandContext(ctx, Binary(t), args...))
}

// Finish is [Product] for any command, and without a limit of time.
func Finish(t testing.TB, cmd *exec.Cmd) (code int, output string) {
	t.Helper()
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s\n%s", strings.Join(cmd.Args[1:], " "), cmd.ProcessState, b)
	return cmd.ProcessState.ExitCode(), string(b)
}
