// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// TestSeverities checks how loud the line of a failed call is.
func TestSeverities(t *testing.T) {
	wrapped := func(err error) error { return fmt.Errorf("volume v: %w", err) }
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"bad attribute":          {errdefs.ErrInvalid, "I"},
		"bad size":               {diskfs.ErrOutOfRange, "I"},
		"another of that name":   {errdefs.ErrExists, "I"},
		"not there":              {errdefs.ErrNotFound, "I"},
		"busy":                   {errdefs.ErrBusy, "I"},
		"template not yet there": {template.ErrBuilding, "I"},
		"deadline":               {fmt.Errorf("%w: %w", template.ErrBuilding, context.DeadlineExceeded), "I"},
		"canceled":               {context.Canceled, "I"},
		"full":                   {pool.ErrFull, "I"},
		"too many":               {errdefs.ErrLimit, "I"},
		"in use":                 {errdefs.ErrState, "I"},
		"unknown method":         {status.Error(codes.Unimplemented, "unknown method"), "I"},
		"pool gone":              {pool.ErrUnusable, "W"},
		"no formatter":           {template.ErrNoFormatter, "W"},
		"probe":                  {errUnhealthy, "W"},
		"locked by another":      {pool.ErrLocked, "E"},
		"anything else":          {errors.New("input/output error"), "E"},
	} {
		out := testenv.CaptureLog(t, "0")
		m := NewMetrics(prometheus.NewRegistry())
		m.log("NodePublishVolume", "NodePublishVolume v", wrapped(c.err), []any{"volume", "v"})
		line := out.String()
		if !strings.HasPrefix(line, c.want) || strings.Count(line, "\n") != 1 || !strings.Contains(line, `] "NodePublishVolume" err=`) || !strings.Contains(line, `volume="v"`) {
			t.Errorf("%s: %s", name, line)
		}
	}
}

// TestRepeatedFailures repeats failed calls as kubelet does, for an hour.
func TestRepeatedFailures(t *testing.T) {
	for v, want := range map[string]int{"0": 60, "4": 3600} {
		out := testenv.CaptureLog(t, v)
		m := NewMetrics(prometheus.NewRegistry())
		start, second := time.Now(), 0
		m.repeats.Now = func() time.Time { return start.Add(time.Duration(second) * time.Second) }
		call := func(method string, req any, err error) {
			m.intercept(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.X/" + method}, func(context.Context, any) (any, error) { return nil, err })
		}
		for ; second < 3600; second++ {
			call("NodePublishVolume", &csi.NodePublishVolumeRequest{VolumeId: "a"}, fmt.Errorf("%w: try %d", errdefs.ErrInvalid, second))
			call("NodePublishVolume", &csi.NodePublishVolumeRequest{VolumeId: "b"}, fmt.Errorf("%w: try %d", pool.ErrUnusable, second))
			call("CreateVolume", &csi.CreateVolumeRequest{Name: "c"}, errors.New("input/output error"))
		}
		for _, part := range []string{`volume="a"`, `volume="b"`, `"CreateVolume" err=`} {
			if n := strings.Count(out.String(), part); n != want {
				t.Errorf("-v %s: %d lines with %s, expected %d", v, n, part, want)
			}
		}
		if n := strings.Count(out.String(), "notLogged=59"); v == "0" && n != 59*3 || v == "4" && n != 0 {
			t.Errorf("-v %s: %d lines say how many were not logged", v, n)
		}
		out.Reset()
		call("NodePublishVolume", &csi.NodePublishVolumeRequest{VolumeId: "a"}, nil)
		if !strings.Contains(out.String(), "failedBefore=3600") {
			t.Errorf("-v %s, at last: %s", v, out)
		}
		if got := m.Served(); got != 3*3600+1 {
			t.Errorf("%d calls were served", got)
		}
	}
}
