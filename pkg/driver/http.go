// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"net/http"
	"net/http/pprof"
	"runtime"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
)

// HTTPHandler serves three pages. /healthz always answers 200: the process lives. /metrics has
// the metrics of g. /readyz answers 200, or 503 if a condition keeps the plugin from being ready,
// and a line for each condition.
//
// No traffic goes away from a pod that is not ready: kubelet calls the plugin all the same. But a
// rollout waits for it. So a condition that a rollout cannot mend, and that leaves the plugin
// working, does not make it unready: see [health.Condition.StillReady].
func HTTPHandler(conditions func() []health.Condition, g prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		found := conditions()
		if len(health.Unready(found)) > 0 {
			http.Error(w, describe(found), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		if len(found) > 0 {
			fmt.Fprintln(w, describe(found))
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	return mux
}

// contentionRate is how many events of contention make one sample of the profiles mutex and
// block: few enough to cost less than a hundredth of the calls' time.
const contentionRate = 100

// WithProfiles adds the pages of [net/http/pprof] below /debug/pprof/, and has the runtime take
// samples of contention. Profiles tell a reader the plugin's flags and what it does, and taking one
// costs time.
func WithProfiles(h http.Handler) http.Handler {
	runtime.SetMutexProfileFraction(contentionRate)
	runtime.SetBlockProfileRate(int(contentionRate * time.Microsecond))
	mux := http.NewServeMux()
	mux.Handle("/", h)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// describe writes one condition a line: its code, since when it holds, what is wrong, and
// what to do. A condition in spite of which the plugin is ready is marked as degraded.
func describe(conditions []health.Condition) string {
	var lines []string
	for _, c := range conditions {
		since := ""
		if !c.Since.IsZero() {
			since = " since " + c.Since.UTC().Format(time.RFC3339)
		}
		message := strings.ReplaceAll(c.Message(), "\n", "; ")
		mark := ""
		if c.StillReady {
			mark = "degraded: "
		}
		lines = append(lines, fmt.Sprintf("%s%s%s: %s", mark, c.Code, since, message))
	}
	return strings.Join(lines, "\n")
}
