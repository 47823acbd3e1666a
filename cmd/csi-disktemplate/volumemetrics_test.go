// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestVolumeMetrics follows devices that go from one volume to the next. What they did for another volume counts for
// none.
func TestVolumeMetrics(t *testing.T) {
	m := newVolumeMetrics(nil)
	seen := func(id string, loop int, number, writes uint64) volume.Traffic {
		return volume.Traffic{Record: image.Record{ID: id}, Loop: loopdev.Attachment{Index: loop, Number: number}, Stats: loopdev.Stats{Writes: writes}}
	}
	for i, step := range []struct {
		seen []volume.Traffic
		want map[string]uint64
	}{
		{[]volume.Traffic{seen("a", 7, 1, 100)}, map[string]uint64{"a": 0}}, // of earlier volumes
		{[]volume.Traffic{seen("a", 7, 1, 110)}, map[string]uint64{"a": 10}},
		{[]volume.Traffic{seen("a", 7, 1, 110), seen("a", 8, 2, 50)}, map[string]uint64{"a": 10}},         // a reader's device
		{[]volume.Traffic{seen("a", 7, 1, 111), seen("a", 8, 2, 52)}, map[string]uint64{"a": 13}},         // both did something
		{[]volume.Traffic{seen("a", 7, 1, 112), seen("b", 8, 3, 60)}, map[string]uint64{"a": 14, "b": 0}}, // another volume has it
		{[]volume.Traffic{seen("a", 7, 9, 500), seen("b", 8, 3, 61)}, map[string]uint64{"a": 14, "b": 1}}, // others had it in between
		{nil, map[string]uint64{}},
		{[]volume.Traffic{seen("a", 7, 9, 501)}, map[string]uint64{"a": 0}},
	} {
		m.add(step.seen)
		if len(m.sums) != len(step.want) {
			t.Errorf("step %d: %v", i, m.sums)
		}
		for id, want := range step.want {
			if got := m.sums[id].Writes; got != want {
				t.Errorf("step %d: volume %s wrote %d times, not %d", i, id, got, want)
			}
		}
	}
}

// TestVolumeSeries looks at the labels of an inline volume and of a claim that has two devices.
func TestVolumeSeries(t *testing.T) {
	writes := uint64(100)
	registry := prometheus.NewRegistry()
	registry.MustRegister(newVolumeMetrics(func() ([]volume.Traffic, error) {
		writes += 5
		inline := image.Record{ID: "a", Pod: image.Pod{Namespace: "shop", Name: "web-0"}}
		claim := image.Record{ID: "b", Name: "pvc-1", Lifecycle: image.Claim}
		did := loopdev.Stats{Writes: writes, Busy: time.Duration(writes) * 100 * time.Millisecond}
		return []volume.Traffic{
			{Record: inline, Loop: loopdev.Attachment{Index: 1}, Stats: did}, {Record: claim, Loop: loopdev.Attachment{Index: 2}, Stats: did}, {Record: claim, Loop: loopdev.Attachment{Index: 3}, Stats: did},
		}, nil
	}))
	for _, want := range [][2]string{{"0", "0"}, {"5", "10"}} {
		page := httptest.NewRecorder()
		driver.HTTPHandler(nil, nil, registry).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
		for _, line := range []string{
			`csi_disktemplate_volume_writes_total{namespace="shop",persistentvolume="",pod="web-0",volume="a"} ` + want[0],
			`csi_disktemplate_volume_writes_total{namespace="",persistentvolume="pvc-1",pod="",volume="b"} ` + want[1],
		} {
			if !strings.Contains(page.Body.String(), line+"\n") {
				t.Errorf("no %s in\n%s", line, page.Body)
			}
		}
	}
}

// TestFailureReason checks which reason a failed build counts for.
func TestFailureReason(t *testing.T) {
	for want, err := range map[string]error{
		"stopped":      fmt.Errorf("%w: canceled: %w", vmformat.ErrFormat, context.Canceled),
		"pool_full":    fmt.Errorf("%w: %w", pool.ErrFull, vmformat.ErrNoSpace),
		"too_small":    fmt.Errorf("%w: %w", diskfs.ErrOutOfRange, vmformat.ErrTooSmall),
		"no_formatter": template.NoFormatter(errors.New("no qemu")),
		"no_content":   template.NoContent(errors.New("no file")),
		"changed":      template.ErrChanged,
		"too_many":     fmt.Errorf("template: %w", template.ErrTooMany),
		"vm":           fmt.Errorf("building: %w", vmformat.ErrFormat),
		"other":        errors.New("input/output error"),
	} {
		if got := failureReason(err); got != want {
			t.Errorf("%v counts for %s, not %s", err, got, want)
		}
	}
}
