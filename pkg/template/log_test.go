// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestFailedBuildsInTheLog checks how loud a build that failed is, and that one that fails again and again is logged once
// a minute.
func TestFailedBuildsInTheLog(t *testing.T) {
	for name, c := range map[string]struct {
		err     error
		stopped bool
		want    string // the severity, or "" for no line
	}{
		"refused by the budget": {err: ErrTooMany},
		"pool full":             {err: pool.ErrFull, want: "W"},
		"no formatter":          {err: ErrNoFormatter, want: "W"},
		"files were replaced":   {err: ErrChanged, want: "W"},
		"no slot":               {err: &waiting{"template ext4 64Mi is queued"}, want: "W"},
		"mkfs failed":           {err: errors.New("mkfs failed"), want: "E"},
		"the plugin stops":      {err: errors.New("killed"), stopped: true, want: "I"},
	} {
		out := testenv.CaptureLog(t, "0")
		s := NewStore(Config{})
		if c.stopped {
			s.Close()
		}
		now := time.Now()
		s.repeats.Now = func() time.Time { return now }
		for range 61 {
			s.logFailed("key", fmt.Errorf("building: %w", c.err))
			now = now.Add(time.Second)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		switch {
		case c.want == "" && out.Len() == 0:
		case len(lines) != 2 || !strings.HasPrefix(lines[0], c.want) || !strings.Contains(lines[0], `template="key"`) || !strings.Contains(lines[1], "notLogged=59"):
			t.Errorf("%s: %s", name, out)
		}
	}
	out := testenv.CaptureLog(t, "0")
	s := NewStore(Config{})
	for _, err := range []error{context.DeadlineExceeded, nil, context.DeadlineExceeded} {
		s.logFailed("key", err)
	}
	if n := strings.Count(out.String(), "\n"); n != 2 {
		t.Errorf("it failed, succeeded and failed: %s", out)
	}
}
