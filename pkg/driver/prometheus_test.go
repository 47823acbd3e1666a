// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// What a real Prometheus makes of the plugin's metrics, of the alerts and of the dashboard.

const monitoring = "../../deploy/monitoring"

// TestRules has promtool check the alerts, and when each of them fires.
func TestRules(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"test", "rules", "alerts.test.yaml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = monitoring
		if code, out := testenv.Finish(t, cmd); code != 0 || !strings.Contains(out, "SUCCESS") {
			t.Errorf("promtool %s: exit code %d", args, code)
		}
	}
}

// scraper is a real Prometheus that scrapes a plugin.
type scraper struct {
	t   *testing.T
	url string
}

// startPrometheus starts one, with the alerts. It ends with the test.
func startPrometheus(t *testing.T, scrapes string) scraper {
	t.Helper()
	dir := testenv.Dir(t)
	rules, err := filepath.Abs(filepath.Join(monitoring, "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`
global: {scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
- job_name: csi-disktemplate
  honor_labels: true # as the PodMonitor has it
  static_configs: [{targets: ["%s"]}]
`, rules, scrapes)
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	p := scraper{t, "http://" + freeAddress(t)}
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "prometheus", "--config.file", file, "--storage.tsdb.path", filepath.Join(dir, "data"),
		"--web.listen-address", strings.TrimPrefix(p.url, "http://"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ended := make(chan string)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends that started the process
		out, err := cmd.CombinedOutput()
		ended <- fmt.Sprintf("Prometheus: %v\n%s", err, out)
	}()
	t.Cleanup(func() {
		stop()
		if log := <-ended; t.Failed() {
			t.Log(log)
		}
	})
	return p
}

// freeAddress is an address where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// ask asks the HTTP API for something, and returns its data.
func (p scraper) ask(path string, query url.Values, data any) error {
	r, err := http.Get(p.url + "/api/v1/" + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.Unmarshal(b, &answer); err != nil {
		return fmt.Errorf("%s: %w", b, err)
	}
	if answer.Status != "success" {
		return errors.New(answer.Error)
	}
	return nil
}

// series returns how many series an expression has, now.
func (p scraper) series(expr string) (int, error) {
	var data struct{ Result []json.RawMessage }
	err := p.ask("query", url.Values{"query": {expr}}, &data)
	return len(data.Result), err
}

// has waits until expressions have series, each of them at the same time: none has one for a while after a scrape that
// failed, on a machine that does other things.
func (p scraper) has(exprs ...string) {
	p.t.Helper()
	var missing []string
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		missing = nil
		for _, expr := range exprs {
			if n, err := p.series(expr); err != nil || n == 0 {
				missing = append(missing, fmt.Sprintf("%s: %d series, %v", expr, n, err))
			}
		}
		if len(missing) == 0 {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("Prometheus does not find:\n%s", strings.Join(missing, "\n"))
		}
	}
}

// TestPrometheus has a real Prometheus scrape a plugin that has done something of everything. Every expression of the
// dashboard has a series then, and every metric in an alert's expression.
func TestPrometheus(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	p := n.start("--volume-metrics")
	prom := startPrometheus(t, p.web)
	r := p.request("first", "ext4", "size", "64Mi")
	p.publish(r)
	prom.has(`csi_disktemplate_volume_writes_total{pod="pod-of-first",namespace="shop"}`)
	p.await("volumes that are ready", p.AllReady)

	_, page := p.get("/metrics")
	check := exec.Command("promtool", "check", "metrics")
	check.Stdin = strings.NewReader(page)
	if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	prom.has(dashboardExpressions(t)...)
	prom.checkAlerts()
	p.unpublish(r)
}

// dashboardExpressions are those of all panels, for all nodes.
func dashboardExpressions(t *testing.T) (all []string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(monitoring, "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			all = append(all, strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*").Replace(target.Expr))
		}
	}
	if len(all) < 30 {
		t.Fatalf("only %d expressions", len(all))
	}
	return all
}

// checkAlerts looks at the rules that Prometheus has loaded. Of all alerts that of emulation is about to fire: the tests'
// plugins have --accel tcg. That of the disk may be, on a machine whose disk is nearly full.
func (p scraper) checkAlerts() {
	p.t.Helper()
	var loaded struct {
		Groups []struct {
			Rules []struct{ Name, Query, Health, State, LastError string }
		}
	}
	testenv.Eventually(p.t, "the rules' evaluation", func() bool {
		if err := p.ask("rules", nil, &loaded); err != nil || len(loaded.Groups) != 1 {
			return false
		}
		for _, r := range loaded.Groups[0].Rules {
			if r.Health == "unknown" {
				return false
			}
		}
		return true
	})
	rules := loaded.Groups[0].Rules
	if len(rules) != 5 {
		p.t.Errorf("%d alerts are loaded", len(rules))
	}
	for _, r := range rules {
		want := "inactive"
		if r.Name == "DisktemplateTCGInUse" {
			want = "pending"
		}
		if r.Health != "ok" || r.State != want && r.Name != "DisktemplateBackingDiskLow" {
			p.t.Errorf("the alert %s is %s and %s, expected %s: %s", r.Name, r.Health, r.State, want, r.LastError)
		}
		p.has(regexp.MustCompile(`\bcsi_disktemplate_\w+`).FindAllString(r.Query, -1)...)
	}
}

// TestMetricsOfBrokenPool makes the goldens unreadable. All other metrics are served as before.
func TestMetricsOfBrokenPool(t *testing.T) {
	n := newNode(t, testenv.XFS, 512<<20)
	p := n.start()
	goldens := filepath.Join(n.Pool, "goldens")
	if err := errors.Join(os.Remove(goldens), os.WriteFile(goldens, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if code, page := p.get("/metrics"); code != 200 || !strings.Contains(page, "\ncsi_disktemplate_ready ") {
		t.Errorf("/metrics: %d %s", code, page)
	}
	if err := errors.Join(os.Remove(goldens), os.Mkdir(goldens, 0o700)); err != nil {
		t.Fatal(err)
	}
}
