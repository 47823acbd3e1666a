// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

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

	p := newNode(t, testenv.XFS, 512<<20).start("--volume-metrics")
	_, page := p.get("/metrics")
	served := servedBy(t, page)
	r := p.request("first", "ext4", "size", "64Mi")
	p.publish(r)
	p.await("volumes that are ready", p.AllReady)
	_, later := p.get("/metrics")
	maps.Copy(served, servedBy(t, later))
	p.countsVolume(r)
	p.unpublish(r)
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
		`csi_disktemplate_sweep_actions_total{action="commit",result="done"} 0`,
		`csi_disktemplate_sweeps_total{result="ok"} 1`,
		`csi_disktemplate_ready 1`,
		`csi_disktemplate_volumes{lifecycle="inline",mode="filesystem"} 0`,
		`csi_disktemplate_volumes{lifecycle="claim",mode="block"} 0`,
		`csi_disktemplate_inline_volumes_limit 500`,
		`csi_disktemplate_inline_bytes_limit +Inf`,
		`csi_disktemplate_template_builds{state="queued"} 0`,
		`csi_disktemplate_template_build_failures_total{reason="vm"} 0`,
		`csi_disktemplate_volumes_created_total{source="golden"} 0`,
		`csi_disktemplate_contents{state="failing"} 0`,
	} {
		if !strings.Contains(page, "\n"+series+"\n") {
			t.Errorf("there is no %s at the start", series)
		}
	}
}

// countsVolume writes to a volume that is published, and looks at what the metrics say of it.
func (p *plugin) countsVolume(r *csi.NodePublishVolumeRequest) {
	p.t.Helper()
	const bytes = 8 << 20
	if err := os.WriteFile(filepath.Join(r.TargetPath, "file"), make([]byte, bytes), 0o600); err != nil {
		p.t.Fatal(err)
	}
	testenv.Run(p.t, "sync", "-f", r.TargetPath)
	if got := p.metric("csi_disktemplate_volume_written_bytes_total"); got < bytes || got > 4*bytes {
		p.t.Errorf("%v bytes were written, expected %d", got, bytes)
	}
	want := `csi_disktemplate_volume_writes_total{namespace="shop",persistentvolume="",pod="pod-of-first",volume="first"} `
	if got := p.samples("csi_disktemplate_volume_writes_total"); len(got) != 1 || !strings.HasPrefix(got[0], want) {
		p.t.Errorf("%q, expected %s", got, want)
	}
	for name, want := range map[string]float64{
		`csi_disktemplate_inline_volumes`: 1, `csi_disktemplate_inline_bytes`: 64 << 20, `csi_disktemplate_templates`: 1,
		`csi_disktemplate_volumes_created_total`: 1, `csi_disktemplate_template_build_failures_total`: 0,
	} {
		if got := p.metric(name); got != want {
			p.t.Errorf("%s is %v, expected %v", name, got, want)
		}
	}
	for name, least := range map[string]float64{
		`csi_disktemplate_template_build_phase_duration_seconds_count`: 6, `csi_disktemplate_template_bytes`: 1 << 12,
	} {
		if got := p.metric(name); got < least {
			p.t.Errorf("%s is %v, expected %v or more", name, got, least)
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
