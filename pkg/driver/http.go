// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"encoding/json"
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
// and a line for each condition but the limitations of the node.
//
// /readyz?verbose has a line for each of the findings, good ones too, in the form that Kubernetes has for
// its own: "[+]" before what is met, or met in part, and "[-]" before what keeps the plugin from being ready.
// With &output=json it has the findings as [Findings].
//
// No traffic goes away from a pod that is not ready: kubelet calls the plugin all the same. But a
// rollout waits for it. So a condition that a rollout cannot mend, and that leaves the plugin
// working, does not make it unready: see [health.Condition.StillReady].
func HTTPHandler(conditions func() []health.Condition, findings func() []health.Finding, g prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Has("verbose") {
			writeVerbose(w, Findings{findings()}, q.Get("output") == "json")
			return
		}
		writePlain(w, health.Acute(conditions()))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{MaxRequestsInFlight: mostScrapes}))
	return mux
}

// mostScrapes is how many answers with all metrics are made at a time: others are told to come later.
const mostScrapes = 4

// Findings is the JSON of /readyz?verbose&output=json.
type Findings struct {
	Findings []health.Finding `json:"findings"`
}

func writePlain(w http.ResponseWriter, found []health.Condition) {
	if len(health.Unready(found)) > 0 {
		http.Error(w, describe(found), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
	if len(found) > 0 {
		fmt.Fprintln(w, describe(found))
	}
}

func writeVerbose(w http.ResponseWriter, f Findings, asJSON bool) {
	code, verdict := http.StatusOK, "passed"
	if health.Worst(f.Findings) == health.StateBroken {
		code, verdict = http.StatusServiceUnavailable, "failed"
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if asJSON {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(f) // an error is the reader's
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	for _, one := range f.Findings {
		fmt.Fprintln(w, verbose(one))
	}
	fmt.Fprintln(w, "readyz check", verdict)
}

// verbose is a finding in one line.
func verbose(f health.Finding) string {
	mark, state := "[+]", "ok"
	switch f.State {
	case health.StateDegraded:
		state = "degraded"
	case health.StateBroken:
		mark, state = "[-]", "failed"
	}
	name := f.Requirement
	if name == "" {
		name = f.Code
	}
	return fmt.Sprintf("%s%s %s: %s", mark, name, state, inOneLine(f.Message()))
}

func inOneLine(text string) string { return strings.ReplaceAll(text, "\n", "; ") }

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
		message := inOneLine(c.Message())
		mark := ""
		if c.StillReady {
			mark = "degraded: "
		}
		lines = append(lines, fmt.Sprintf("%s%s%s: %s", mark, c.Code, since, message))
	}
	return strings.Join(lines, "\n")
}
