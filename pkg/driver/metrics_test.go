// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestMetricsAreDocumented compares the metrics of a plugin with the table in the documents: of one that nobody has called
// yet, and, for what is absent until then, of one that keeps volumes ready.
func TestMetricsAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	b, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n## Metrics\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (\\w+) \\|([^|]*)\\|").FindAllStringSubmatch(section, -1) {
		documented[fmt.Sprint(m[1], " ", m[2], " ", labelsIn(m[3], "`(\\w+)`"))] = true
	}
	if len(documented) < 9 {
		t.Errorf("only %d metrics are documented", len(documented))
	}

	p := newNode(t, testenv.XFS, 512<<20).start()
	_, page := p.get("/metrics")
	served := servedBy(t, page)
	r := p.request("first", "ext4", "size", "64Mi")
	p.publish(r)
	p.unpublish(r)
	p.await("volumes that are ready", p.AllReady)
	_, later := p.get("/metrics")
	maps.Copy(served, servedBy(t, later))
	for metric := range served {
		if !documented[metric] {
			t.Errorf("%s is not documented", metric)
		}
	}
	for metric := range documented {
		if !served[metric] {
			t.Errorf("%s is documented, and not served", metric)
		}
	}
	for _, series := range []string{
		`csi_disktemplate_condition{code="PoolFull"} 0`,
		`csi_disktemplate_condition{code="NotRegistered"} 0`,
		`csi_disktemplate_operation_duration_seconds_count{code="OK",method="NodePublishVolume"} 0`,
		`csi_disktemplate_operation_duration_seconds_count{code="OK",method="CreateSnapshot"} 0`,
		`csi_disktemplate_template_requests_total{result="hit"} 0`,
		`csi_disktemplate_template_requests_total{result="miss"} 0`,
		`csi_disktemplate_template_build_duration_seconds_count{filesystem="btrfs",result="error"} 0`,
		`csi_disktemplate_template_build_duration_seconds_count{filesystem="xfs",result="ok"} 0`,
		`csi_disktemplate_templates_trimmed_total 0`,
		`csi_disktemplate_sweep_actions_total{action="delete",result="done"} 0`,
		`csi_disktemplate_sweep_actions_total{action="leave",result="left"} 0`,
	} {
		if !strings.Contains(page, "\n"+series+"\n") {
			t.Errorf("there is no %s at the start", series)
		}
	}
}

// servedBy returns the metrics of a page, with their types and labels. Each must have a series.
func servedBy(t *testing.T, page string) map[string]bool {
	t.Helper()
	served := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\w+) (\w+)$`).FindAllStringSubmatch(page, -1) {
		name, kind := m[1], m[2]
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue
		}
		sample := regexp.MustCompile(`(?m)^` + name + `(?:_count)?(?:\{(.*)\})? (\S+)$`).FindStringSubmatch(page)
		if sample == nil {
			t.Errorf("%s has no series", name)
			continue
		}
		served[fmt.Sprint(name, " ", kind, " ", labelsIn(sample[1], `(\w+)="`))] = true
	}
	return served
}

// labelsIn returns what a pattern finds, sorted.
func labelsIn(text, pattern string) []string {
	var names []string
	for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		names = append(names, m[1])
	}
	slices.Sort(names)
	return names
}
