// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// BenchmarkPod measures the time from the creation of a pod until it is running: with an emptyDir, with an inline volume,
// and with a claim that is made for it. The kinds take turns, so that a moment's load meets each of them.
//
//	go test -tags e2e -run '^$' -bench Pod -benchtime 20x ./hack/kube/e2e
func BenchmarkPod(b *testing.B) {
	kinds := []struct{ name, volume string }{
		{"emptyDir", "emptyDir: {}"},
		{"inline-ext4", "csi: {driver: csi.disktemplate.io, fsType: ext4, volumeAttributes: {size: 1Gi}}"},
		{"inline-xfs", "csi: {driver: csi.disktemplate.io, fsType: xfs, volumeAttributes: {size: 1Gi}}"},
		{"claim-ext4", ephemeral("disktemplate-ext4", "1Gi")},
		{"claim-xfs", ephemeral("disktemplate-xfs", "1Gi")},
	}
	took := map[string]float64{}
	round := func(i int, count bool) {
		for _, k := range kinds {
			name := fmt.Sprintf("bench-%s-%d", strings.ToLower(k.name), i)
			pod := pod(name, "sleep infinity", k.volume)
			start := time.Now()
			if _, err := cluster(pod, "kubectl", "create", "-f", "-"); err != nil {
				b.Fatal(err)
			}
			if _, err := cluster("", "kubectl", "wait", "--for=jsonpath={.status.phase}=Running", "pod/"+name, "--timeout=60s"); err != nil {
				b.Fatal(err)
			}
			if count {
				took[k.name] += time.Since(start).Seconds()
			}
			remove(b, pod)
		}
	}
	round(0, false) // the templates
	i := 0
	for b.Loop() {
		i++
		round(i, true)
	}
	for _, k := range kinds {
		b.ReportMetric(took[k.name]/float64(i), k.name+"-s/pod")
		b.ReportMetric(took[k.name]/took["emptyDir"], k.name+"/emptyDir")
	}
	mustBeClean(b)
}

// BenchmarkPodsAtOnce measures the time from the creation of 20 pods at once until all of them are running, with emptyDirs
// and with inline volumes. The kinds take turns.
//
//	go test -tags e2e -run '^$' -bench PodsAtOnce -benchtime 5x ./hack/kube/e2e
func BenchmarkPodsAtOnce(b *testing.B) {
	const atOnce = 20
	kinds := []struct{ name, volume string }{
		{"emptyDir", "emptyDir: {}"},
		{"inline-ext4", "csi: {driver: csi.disktemplate.io, fsType: ext4, volumeAttributes: {size: 1Gi}}"},
		{"inline-xfs", "csi: {driver: csi.disktemplate.io, fsType: xfs, volumeAttributes: {size: 1Gi}}"},
	}
	took := map[string]float64{}
	round := func(i int) {
		for _, k := range kinds {
			var pods string
			wait := []string{"kubectl", "wait", "--for=jsonpath={.status.phase}=Running", "--timeout=120s"}
			for n := range atOnce {
				name := fmt.Sprintf("at-once-%s-%d-%d", strings.ToLower(k.name), i, n)
				pods += pod(name, "sleep infinity", k.volume)
				wait = append(wait, "pod/"+name)
			}
			start := time.Now()
			if _, err := cluster(pods, "kubectl", "create", "-f", "-"); err != nil {
				b.Fatal(err)
			}
			if _, err := cluster("", wait...); err != nil {
				b.Fatal(err)
			}
			if i > 0 { // the first builds the templates
				took[k.name] += time.Since(start).Seconds()
			}
			remove(b, pods)
		}
	}
	round(0)
	i := 0
	for b.Loop() {
		i++
		round(i)
	}
	for _, k := range kinds {
		b.ReportMetric(took[k.name]/float64(i), k.name+"-s")
		b.ReportMetric(took[k.name]/took["emptyDir"], k.name+"/emptyDir")
	}
	mustBeClean(b)
}
