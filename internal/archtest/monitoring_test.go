// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package archtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// This file compares what is monitored with the documents. That the plugin serves the documented metrics, and that
// Prometheus evaluates every expression, is tested in pkg/driver.

// alerts are the groups of a rules file.
type alerts struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Alert, Expr, For    string
			Labels, Annotations map[string]string
		}
	}
}

func readYAML(t *testing.T, path string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err == nil {
		err = yaml.UnmarshalStrict(b, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

const runbooks = "docs/runbooks.md"

// TestAlertsAreComplete checks that each alert says how bad it is and what to do, and that its runbook is there.
func TestAlertsAreComplete(t *testing.T) {
	var is alerts
	readYAML(t, "deploy/monitoring/alerts.yaml", &is)
	headings := anchors(t, filepath.Join(root, runbooks))
	var names []string
	for _, r := range is.Groups[0].Rules {
		names = append(names, r.Alert)
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) || r.For == "" {
			t.Errorf("%s has the severity %q, and waits for %q", r.Alert, r.Labels["severity"], r.For)
		}
		if r.Annotations["summary"] == "" || !strings.HasSuffix(r.Annotations["description"], ".") {
			t.Errorf("%s says %q", r.Alert, r.Annotations)
		}
		url, anchor, _ := strings.Cut(r.Annotations["runbook_url"], "#")
		if !strings.HasSuffix(url, "/blob/main/"+runbooks) || anchor != strings.ToLower(r.Alert) || !slices.Contains(headings, anchor) {
			t.Errorf("%s leads to %s#%s", r.Alert, url, anchor)
		}
	}
	if len(names) != 5 {
		t.Errorf("the alerts are %v", names)
	}
	for _, h := range headings[1:] {
		if !slices.ContainsFunc(names, func(n string) bool { return strings.ToLower(n) == h }) {
			t.Errorf("%s has the section %s, which is no alert's", runbooks, h)
		}
	}
}

// TestAlertsAreOne compares the rules file with the component's PrometheusRule.
func TestAlertsAreOne(t *testing.T) {
	var file alerts
	var object struct {
		APIVersion, Kind string
		Metadata         any
		Spec             alerts
	}
	readYAML(t, "deploy/monitoring/alerts.yaml", &file)
	readYAML(t, "deploy/kubernetes/components/monitors/prometheusrule.yaml", &object)
	if len(file.Groups) == 0 || !reflect.DeepEqual(file, object.Spec) {
		t.Error("the PrometheusRule has other groups than deploy/monitoring/alerts.yaml: run hack/alerts.sh")
	}
}

// TestPodMonitorFindsPlugin compares the component's PodMonitor with the pods that it is for.
func TestPodMonitorFindsPlugin(t *testing.T) {
	type selector struct{ MatchLabels map[string]string }
	var monitor struct {
		APIVersion, Kind string
		Metadata         any
		Spec             struct {
			Selector            selector
			PodMetricsEndpoints []struct {
				Port, Path  string
				HonorLabels bool
				Relabelings any
			}
		}
	}
	readYAML(t, "deploy/kubernetes/components/monitors/podmonitor.yaml", &monitor)
	b, err := os.ReadFile(filepath.Join(root, "deploy/kubernetes/base/plugin.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var plugin struct {
		Spec struct {
			Selector selector
			Template struct {
				Spec struct {
					Containers []struct{ Ports []struct{ Name string } }
				}
			}
		}
	}
	if err := yaml.Unmarshal(b, &plugin); err != nil {
		t.Fatal(err)
	}
	port := plugin.Spec.Template.Spec.Containers[0].Ports[0].Name
	if !reflect.DeepEqual(monitor.Spec.Selector, plugin.Spec.Selector) || monitor.Spec.PodMetricsEndpoints[0].Port != port {
		t.Errorf("the PodMonitor has %+v, the plugin %+v and the port %s", monitor.Spec, plugin.Spec.Selector, port)
	}
}

var (
	metricName = regexp.MustCompile(`\bcsi_disktemplate_\w+`)
	metricRow  = regexp.MustCompile("(?m)^\\| `(csi_disktemplate_\\w+)` \\| (\\w+) \\|")
)

// TestMonitoredMetricsExist checks the names of metrics in the alerts, their tests and the dashboard.
func TestMonitoredMetricsExist(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "docs/operating.md"))
	if err != nil {
		t.Fatal(err)
	}
	series := map[string]bool{}
	for _, m := range metricRow.FindAllStringSubmatch(string(b), -1) {
		if m[2] != "histogram" {
			series[m[1]] = true
			continue
		}
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			series[m[1]+suffix] = true
		}
	}
	for file, least := range map[string]int{"alerts.yaml": 8, "alerts.test.yaml": 8, "dashboard.json": 40} {
		b, err := os.ReadFile(filepath.Join(root, "deploy/monitoring", file))
		if err != nil {
			t.Fatal(err)
		}
		names := metricName.FindAllString(string(b), -1)
		for _, name := range names {
			if !series[name] {
				t.Errorf("%s has %s, which is no series in docs/operating.md", file, name)
			}
		}
		slices.Sort(names)
		if n := len(slices.Compact(names)); n < least {
			t.Errorf("%s has %d metrics", file, n)
		}
	}
}

// TestDashboard checks what Grafana would not complain of: panels that overlap, or that have no title or unit.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(root, "deploy/monitoring/dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	type place struct{ X, Y, W, H int }
	var is struct {
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     place
			Targets     []struct{ Expr, LegendFormat string }
			FieldConfig struct{ Defaults struct{ Unit string } }
		}
	}
	if err := json.Unmarshal(b, &is); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range is.Panels {
		if p.Title == "" || ids[p.ID] || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %d, %q, is at %+v", p.ID, p.Title, p.GridPos)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("panel %q lies over %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || p.FieldConfig.Defaults.Unit == "" {
			t.Errorf("panel %q has %d expressions, in %q", p.Title, len(p.Targets), p.FieldConfig.Defaults.Unit)
		}
		for _, target := range p.Targets {
			if target.LegendFormat == "" || !strings.Contains(target.Expr, `{instance=~"$instance"`) {
				t.Errorf("panel %q shows %q as %q", p.Title, target.Expr, target.LegendFormat)
			}
		}
	}
}
