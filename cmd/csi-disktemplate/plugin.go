// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/growfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// runPlugin puts the rooms together and serves until ctx ends.
func runPlugin(ctx context.Context, o pluginOptions) error {
	dc := driver.Config{Endpoint: o.endpoint, Name: o.driverName, Version: version, NodeID: o.nodeID, MaxVolumes: o.maxVolumes, SharedResizer: o.sharedResizer, SweepInterval: o.sweepInterval}
	pc, err := o.pool.config()
	// All that can be judged by the flags alone, before anything is made.
	if err := errors.Join(err, dc.Validate(), o.vm.validate(), o.validate()); err != nil {
		return err
	}
	if o.registrationDir != "" {
		if dc.Registration, err = driver.NewRegistration(o.registrationDir, dc); err != nil {
			return err
		}
	}
	p, err := pool.Open(ctx, pc)
	if err != nil {
		return err
	}
	defer p.Close()
	owner, err := p.Own(ctx)
	if err != nil {
		return err
	}
	defer owner.Unlock()
	formatter, err := o.vm.formatter(p.CacheDir())
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	registerPool(registry, p)
	reportAccelerator(registry, formatter)

	budget, err := templateBudget(p, o.templateCache)
	if err != nil {
		return err
	}
	store := template.NewStore(template.Config{
		Pool:          p,
		Fingerprint:   formatter.Fingerprint,
		Format:        formatFunc(formatter),
		MaxBuilds:     o.maxVMs,
		BuildsPerHour: o.maxBuildsPerHour,
		Budget:        budget,
		Observe:       observeBuilds(registry),
		Trimmed:       observeTrims(registry),
	})
	defer store.Close()
	headroom, err := size.ParseShare(o.headroom)
	if err != nil {
		return err
	}
	limits, err := o.inline.limits()
	if err != nil {
		return err
	}
	volumes, err := volume.NewManager(volume.Config{
		Pool: p, Templates: store, TargetRoot: o.kubeletDir, Grow: growfs.Grow, Headroom: headroom, Overcommit: o.overcommit, Limits: limits,
	})
	if err != nil {
		return err
	}
	defer volumes.Close()

	health := func() error { return errors.Join(p.Check(), formatter.Check()) }
	ready := health
	if dc.Registration != nil {
		ready = func() error { return errors.Join(health(), dc.Registration.Check()) }
	}
	if err := health(); err != nil {
		klog.ErrorS(err, "Not ready; what templates there are will be served")
	}
	go warm(formatter)
	g, ctx := errgroup.WithContext(ctx)
	if o.httpEndpoint != "" {
		l, err := net.Listen("tcp", o.httpEndpoint)
		if err != nil {
			return fmt.Errorf("--http-endpoint: %w", err)
		}
		klog.InfoS("Serving health and metrics", "address", l.Addr())
		g.Go(func() error { return serveHTTP(ctx, l, driver.HTTPHandler(ready, registry)) })
	}
	dc.Volumes, dc.Health, dc.Metrics = volumes, health, driver.NewMetrics(registry)
	g.Go(func() error { return driver.Serve(ctx, dc) })
	return g.Wait()
}

// templateBudget is what --template-cache allows, or nil if that is everything. The pool
// may grow while the plugin runs.
func templateBudget(p *pool.Pool, flag string) (func() (int64, error), error) {
	share, err := size.ParseShare(flag)
	if err != nil || share == (size.Share{}) {
		return nil, err
	}
	return func() (int64, error) {
		s, err := p.Space()
		return share.Of(s.Total), err
	}, nil
}

// warm has the formatter read its files now, tens of MiB of kernel and
// programs, so that the first volume does not wait for that. What is missing
// was reported already.
func warm(formatter *vmformat.Formatter) {
	for _, name := range diskfs.Names() {
		if fs, err := diskfs.Lookup(name); err == nil {
			formatter.Fingerprint(diskfs.Spec{Filesystem: name, Size: fs.DefaultSize()})
		}
	}
}

// formatFunc joins the formatter to the template store, and gives its errors
// the store's and the pool's meaning.
func formatFunc(formatter *vmformat.Formatter) func(context.Context, *os.File, diskfs.Spec) (template.Provenance, error) {
	return func(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
		r, err := formatter.Format(ctx, f, spec, nil)
		switch {
		case errors.Is(err, vmformat.ErrNoSpace):
			return template.Provenance{}, fmt.Errorf("%w: %w", pool.ErrFull, err)
		case errors.Is(err, vmformat.ErrUnavailable):
			return template.Provenance{}, fmt.Errorf("%w: %w", template.ErrNoFormatter, err)
		case err != nil:
			return template.Provenance{}, err
		}
		return template.Provenance{
			Fingerprint: r.Fingerprint, UUID: r.UUID, Kernel: r.Kernel, Mkfs: r.Mkfs, Accelerator: string(r.Accelerator),
		}, nil
	}
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// registerPool offers the pool's space as metrics.
func registerPool(r prometheus.Registerer, p *pool.Pool) {
	gauge := func(name, help string, value func(pool.Space) int64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			s, err := p.Space()
			if err != nil {
				klog.ErrorS(err, "Reading the pool's space")
			}
			return float64(value(s))
		}))
	}
	gauge("csi_disktemplate_pool_size_bytes", "Size of the pool's filesystem.", func(s pool.Space) int64 { return s.Total })
	gauge("csi_disktemplate_pool_available_bytes", "Space left on the pool's filesystem.", func(s pool.Space) int64 { return s.Available })
}

// reportAccelerator says, in the log and as a metric, what formats here.
func reportAccelerator(r prometheus.Registerer, formatter *vmformat.Formatter) {
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "csi_disktemplate_formatter_accelerator_info",
		Help: "1 for the accelerator that the formatting VM runs on.",
	}, []string{"accelerator"})
	r.MustRegister(info)
	accel, whyNotKVM, err := formatter.Accelerator()
	if err != nil {
		klog.ErrorS(err, "No accelerator for the formatting VM")
		return
	}
	info.WithLabelValues(string(accel)).Set(1)
	if whyNotKVM != nil {
		klog.InfoS("Warning: formatting without KVM; a new template takes seconds longer", "accelerator", accel, "reason", whyNotKVM)
	}
}

// observeBuilds counts and times template builds.
func observeBuilds(r prometheus.Registerer) func(diskfs.Spec, time.Duration, error) {
	builds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "csi_disktemplate_template_build_duration_seconds",
		Help:    "Duration of template builds by filesystem and result.",
		Buckets: prometheus.ExponentialBuckets(0.5, 2, 9), // to 128 s, beyond the VM's deadline
	}, []string{"filesystem", "result"})
	r.MustRegister(builds)
	return func(spec diskfs.Spec, took time.Duration, err error) {
		result := "ok"
		if err != nil {
			result = "error"
		}
		builds.WithLabelValues(spec.Filesystem, result).Observe(took.Seconds())
	}
}

// observeTrims counts the templates that --template-cache has removed.
func observeTrims(r prometheus.Registerer) func(string, int64) {
	trims := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "csi_disktemplate_templates_trimmed_total",
		Help: "Templates removed because all of them took more than --template-cache.",
	})
	r.MustRegister(trims)
	return func(string, int64) { trims.Inc() }
}
