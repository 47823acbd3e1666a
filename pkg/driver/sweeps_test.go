// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// TestSweepMetrics counts sweeps that end in every way, and what they leave.
func TestSweepMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := newSweepMetrics(registry)
	has := func(what string, series ...string) {
		t.Helper()
		page := httptest.NewRecorder()
		HTTPHandler(nil, nil, registry).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
		for _, s := range series {
			if !strings.Contains(page.Body.String(), "\ncsi_disktemplate_sweep"+s+"\n") {
				t.Errorf("%s: no %s in\n%s", what, s, page.Body)
			}
		}
	}
	has("at the start", "_last_timestamp_seconds 0", "_last_failed 0", "_left 0", `s_total{result="ok"} 0`, `s_total{result="error"} 0`,
		`_actions_total{action="commit",result="failed"} 0`)
	m.swept([]sweep.Action{
		{Verb: sweep.Leave}, {Verb: sweep.Delete, Result: "device busy"}, {Verb: sweep.Delete, Result: sweep.Done}, {Verb: sweep.Thaw, Result: sweep.Skipped},
	}, nil)
	has("one that left things", "_last_failed 0", "_left 2", `s_total{result="ok"} 1`, `_actions_total{action="leave",result="left"} 1`,
		`_actions_total{action="delete",result="failed"} 1`, `_actions_total{action="delete",result="done"} 1`, `_actions_total{action="thaw",result="skipped"} 1`)
	m.swept(nil, errors.New("a disk that fails"))
	has("one that failed", "_last_failed 1", "_left 2", `s_total{result="error"} 1`)
	m.swept(nil, fmt.Errorf("stopped: %w", context.Canceled))
	has("one that the plugin's end stopped", "_last_failed 1", `s_total{result="error"} 1`, `s_total{result="ok"} 1`)
	m.swept(nil, nil)
	has("one that found nothing", "_last_failed 0", "_left 0", `s_total{result="ok"} 2`)
}
