// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
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
	seen := func(id string, loop int, attachment, writes uint64) volume.Traffic {
		return volume.Traffic{Record: image.Record{ID: id}, Loop: loop, Attachment: attachment, Stats: loopdev.Stats{Writes: writes}}
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

// TestFailureReason checks which reason a failed build counts for.
func TestFailureReason(t *testing.T) {
	for want, err := range map[string]error{
		"stopped":      fmt.Errorf("%w: canceled: %w", vmformat.ErrFormat, context.Canceled),
		"pool_full":    fmt.Errorf("%w: %w", pool.ErrFull, vmformat.ErrNoSpace),
		"too_small":    fmt.Errorf("%w: %w", diskfs.ErrOutOfRange, vmformat.ErrTooSmall),
		"no_formatter": template.NoFormatter(errors.New("no qemu")),
		"no_content":   template.NoContent(errors.New("no file")),
		"changed":      template.ErrChanged,
		"vm":           fmt.Errorf("building: %w", vmformat.ErrFormat),
		"other":        errors.New("input/output error"),
	} {
		if got := failureReason(err); got != want {
			t.Errorf("%v counts for %s, not %s", err, got, want)
		}
	}
}
