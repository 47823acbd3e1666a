// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// HTTPHandler serves three pages. /healthz always answers 200: the process lives. /readyz
// answers 200 if ready returns no condition, else 503 and a line for each condition.
// /metrics has the metrics of g.
func HTTPHandler(ready func() []health.Condition, g prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if conditions := ready(); len(conditions) > 0 {
			http.Error(w, describe(conditions), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	return mux
}

// describe writes one condition a line: its code, since when it holds, what is wrong, and
// what to do.
func describe(conditions []health.Condition) string {
	var lines []string
	for _, c := range conditions {
		since := ""
		if !c.Since.IsZero() {
			since = " since " + c.Since.UTC().Format(time.RFC3339)
		}
		message := strings.ReplaceAll(c.Message(), "\n", "; ")
		lines = append(lines, fmt.Sprintf("%s%s: %s", c.Code, since, message))
	}
	return strings.Join(lines, "\n")
}
