// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// This file writes one line of the log for each call, and counts and times it.
//
// How loud a line is depends on whose concern it is, and not on how the call ended:
//
//   - I for a call that did what was asked, or that failed because of what was asked: a bad
//     attribute, a volume that is there or not there, too large, too many, or not yet. The one who
//     asked reads why in an event of the pod or the claim.
//   - W for a call that failed because the plugin is not ready. The condition itself was logged
//     when it began, see package health. A full pool is the caller's concern, as is any other
//     volume that is too large.
//   - E for a call that failed because of this plugin or its node.
//
// Kubelet repeats what failed. The same failure of the same volume is logged at most once a
// minute, with how many were not: see [logs.Repeats].

// Metrics counts, times and logs what the driver does.
type Metrics struct {
	served    atomic.Int64 // calls
	requests  *admin.Calls
	repeats   logs.Repeats
	calls     *prometheus.HistogramVec
	templates *prometheus.CounterVec
	made      *prometheus.CounterVec
	sweeps    sweepMetrics
}

// NewMetrics registers the driver's metrics. Every series that can be known exists from the start,
// with 0: a series that begins with 1 has no increase that Prometheus could see.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: admin.NewCalls(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "csi_disktemplate_operation_duration_seconds",
			Help: "Duration of CSI calls by method and gRPC status code.",
			// From a volume that is ready (some 100 µs) to a template build beyond its time limit.
			Buckets: prometheus.ExponentialBuckets(50e-6, 2, 23),
		}, []string{"method", "code"}),
		templates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_disktemplate_template_requests_total",
			Help: "Volumes made from a template that was there when the volume was asked for first (hit), or was not (miss).",
		}, []string{"result"}),
		made: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "csi_disktemplate_volumes_created_total",
			Help: "New volumes by what they are a clone of: template, golden, snapshot, volume, or none for an empty disk.",
		}, []string{"source"}),
		sweeps: newSweepMetrics(r),
	}
	r.MustRegister(m.calls, m.templates, m.made)
	for method := range quiet {
		m.calls.WithLabelValues(method, codes.OK.String())
	}
	for _, result := range []string{"hit", "miss"} {
		m.templates.WithLabelValues(result)
	}
	for _, source := range []string{"template", "golden", "snapshot", "volume", "none"} {
		m.made.WithLabelValues(source)
	}
	return m
}

// Made counts a new volume: see [volume.Config].
func (m *Metrics) Made(r volume.Result) {
	m.made.WithLabelValues(madeFrom(r)).Inc()
	if r.Template == "" {
		return
	}
	result := "miss"
	if r.TemplateHit {
		result = "hit"
	}
	m.templates.WithLabelValues(result).Inc()
}

func madeFrom(r volume.Result) string {
	switch {
	case r.Golden != "":
		return "golden"
	case r.Template != "":
		return "template"
	case r.Source.Snapshot != "":
		return "snapshot"
	case r.Source.Volume != "":
		return "volume"
	}
	return "none"
}

// met logs whether a request's volume existed, whether its template did, what golden it started from, and how durable it is.
func met(ctx context.Context, r volume.Result) {
	if r.Durability != "" {
		note(ctx, "durability", r.Durability)
	}
	if r.Existed {
		note(ctx, "existed", true)
	}
	if r.Golden != "" {
		note(ctx, "golden", r.Golden)
	}
	if r.Template == "" {
		return
	}
	note(ctx, "template", r.Template, "templateHit", r.TemplateHit)
}

// details are the keys and values that a handler adds to the log line of its call.
type details struct{ pairs []any }

type detailsKey struct{}

// note adds keys and values to the log line of the call that ctx belongs to.
func note(ctx context.Context, pairs ...any) {
	if d, ok := ctx.Value(detailsKey{}).(*details); ok {
		d.pairs = append(d.pairs, pairs...)
	}
}

// quiet are the methods that the driver implements. Those with true are called often and change
// nothing: their successful calls are logged only at level 4.
var quiet = map[string]bool{
	"Probe": true, "GetPluginInfo": true, "GetPluginCapabilities": true,

	"NodeStageVolume": false, "NodeUnstageVolume": false, "NodePublishVolume": false, "NodeUnpublishVolume": false, "NodeExpandVolume": false,
	"NodeGetCapabilities": true, "NodeGetInfo": true, "NodeGetVolumeStats": true,
	"NodeGetVolumeHealth": true, "NodeGetStorageHealth": true,

	"CreateVolume": false, "DeleteVolume": false, "ControllerExpandVolume": false, "CreateSnapshot": false, "DeleteSnapshot": false,
	"ControllerGetCapabilities": true, "GetCapacity": true, "ValidateVolumeCapabilities": true,
	"ListVolumes": true, "ControllerGetVolume": true, "ListSnapshots": true, "GetSnapshot": true,
	"ControllerGetVolumeHealth": true, "ControllerListVolumeHealth": true,
}

// Served is the number of calls that were answered.
func (m *Metrics) Served() int64 { return m.served.Load() }

// Requests are the calls of late, without what their requests have.
func (m *Metrics) Requests() admin.Requests { return m.requests.List() }

// intercept handles a call: it gives the error its status code, counts and times the call,
// and logs it.
func (m *Metrics) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	d := &details{}
	if v, ok := req.(interface{ GetVolumeId() string }); ok {
		d.pairs = append(d.pairs, "volume", v.GetVolumeId())
	}
	klog.V(5).InfoS("Request", "method", method, "request", sanitized{req})
	start := time.Now()
	call := m.requests.Begin(start, method, idOf(req), podIn(req))
	resp, err := handler(template.Watch(context.WithValue(ctx, detailsKey{}, d), call.Waits), req)
	took := time.Since(start)
	c := code(err)
	call.End(admin.Ended{Code: c.String(), Cause: causeOf(err), Err: err, Took: took, Quiet: quiet[method]})
	m.served.Add(1)
	m.calls.WithLabelValues(method, c.String()).Observe(took.Seconds())
	m.log(method, objectOf(method, req), err, append(d.pairs, "duration", took, "code", c.String()))
	return resp, toStatus(err)
}

// log logs a call of a method on an object.
func (m *Metrics) log(method, object string, err error, pairs []any) {
	if err == nil {
		if n := m.repeats.Succeeded(object); n > 0 {
			pairs = append(pairs, "failedBefore", n)
		}
		if !quiet[method] || klog.V(4).Enabled() {
			klog.InfoS(method, pairs...)
		}
		return
	}
	show, left := m.repeats.Failed(object, code(err).String())
	if !show {
		return
	}
	if left > 0 {
		pairs = append(pairs, "notLogged", left)
	}
	switch concernOf(err) {
	case plugins:
		klog.ErrorS(err, method, pairs...)
	case conditions:
		logs.Warn(method, append([]any{"err", err}, pairs...)...)
	default:
		klog.InfoS(method, append([]any{"err", err}, pairs...)...)
	}
}

// concern is whose concern a failed call is.
type concern int

const (
	callers    concern = iota // what was asked for cannot be had, or not now
	conditions                // something is wrong, and was logged when it began
	plugins                   // something failed that should not
)

// concernOf returns whose concern an error is.
func concernOf(err error) concern {
	switch code(err) {
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.Unavailable:
		return plugins
	}
	if errors.Is(err, pool.ErrUnusable) || errors.Is(err, template.ErrNoFormatter) || errors.Is(err, errUnhealthy) {
		return conditions
	}
	return callers
}

// objectOf names what a call works on, to tell repetitions. An id that is too long to be one is
// cut, which bounds the memory.
func objectOf(method string, req any) string {
	id := idOf(req)
	return method + " " + id[:min(len(id), 256)]
}

// idOf is the id of the volume or snapshot that a call works on, or the name of one that is to be made.
func idOf(req any) string {
	switch r := req.(type) {
	case interface{ GetVolumeId() string }:
		return r.GetVolumeId()
	case interface{ GetName() string }:
		return r.GetName()
	case interface{ GetSnapshotId() string }:
		return r.GetSnapshotId()
	}
	return ""
}

// podIn is the pod that a call names, or nil.
func podIn(req any) *admin.Pod {
	r, ok := req.(*csi.NodePublishVolumeRequest)
	if !ok {
		return nil
	}
	pod := podOf(r)
	if pod == (image.Pod{}) {
		return nil
	}
	return &admin.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
}

// sanitized prints a request without its secrets. It does the work only when it is printed.
type sanitized struct{ req any }

func (s sanitized) String() string {
	req := s.req
	// The tokens of a pod's service account come in the volume context. protosanitizer
	// does not strip it, because CSI does not mark it as secret.
	if p, ok := req.(*csi.NodePublishVolumeRequest); ok {
		if _, has := p.GetVolumeContext()[keyTokens]; has {
			p = proto.Clone(p).(*csi.NodePublishVolumeRequest)
			p.VolumeContext[keyTokens] = "***stripped***"
			req = p
		}
	}
	return strings.TrimSpace(protosanitizer.StripSecrets(req).String())
}
