// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin/webpage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/growfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/prewarm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// runPlugin opens the rooms, from the pool up, and serves until ctx ends.
func runPlugin(ctx context.Context, o pluginOptions) error {
	started := time.Now()
	klog.InfoS("Starting csi-disktemplate", "version", versionName())
	registration, err := newRegistration(o)
	if err != nil {
		return err
	}
	if err := checkKubeletDir(o.kubeletDir); err != nil { // the last step that makes nothing
		return err
	}
	o.pool.NodeDir = o.kubeletDir
	pool.CleanAll = cleanAllLine(os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME"), o.pool.Dir)
	p, err := pool.Open(ctx, o.pool)
	if err != nil {
		return err
	}
	defer p.Close()
	owner, err := p.Own(ctx)
	if err != nil {
		return err
	}
	defer owner.Unlock()
	o.vm.VMs, o.vm.Save = o.maxVMs, true
	formatter, err := newFormatter(o.vm, p.CacheDir())
	if err != nil {
		return err
	}
	registry := newRegistry(p, formatter)
	builder, err := newBuilder(ctx, o.contents, p, formatter)
	if err != nil {
		return err
	}
	builder.phases = observePhases(registry)
	store := template.NewStore(templateConfig(o, p, builder, registry))
	defer store.Close()
	goldens, sharingConditions, err := o.goldens.goldens(p)
	if err != nil {
		return err
	}
	metrics := driver.NewMetrics(registry)
	volumes, err := volume.NewManager(volume.Config{
		Pool: p, Templates: store, TargetRoot: o.kubeletDir, GrowFilesystem: growfs.Grow, Headroom: o.headroom, Overcommit: o.overcommit, Limits: o.limits,
		DefaultDurability: o.durability, Made: metrics.Made, Spare: builder.spare, Warm: o.warm, WarmMost: o.warmMost,
		Content: builder.content(), Goldens: goldens,
	})
	if err != nil {
		return err
	}
	defer volumes.Close()

	logStart(o, p, formatter)
	o.prewarm.Templates = store
	prewarmer := prewarm.New(o.prewarm)
	listed, first := prewarmer.Requirements()
	look := newLookout(
		slices.Concat(nodeRequirements(o, poolRequirements(p, volumes), formatter), workRequirements(volumes, listed, builder, o.goldens.requirement(volumes, sharingConditions))),
		lateRequirements(first, &o.prewarm, registration),
	)
	look.healthy() // logs what is wrong from the start
	registry.MustRegister(conditionMetric(look.ready), prewarmMetric(prewarmer.Counts))
	registerEnding(registry, volumes.Ending)
	registry.MustRegister(warmMetrics{volumes}, contentMetrics{builder}, goldenMetrics{volumes})
	registerReady(registry, look.ready)
	registerSpace(registry, p, volumes)
	registerVolumes(registry, volumes, o.limits)
	registerTemplates(registry, store, formatter)
	registerContents(registry, builder)
	if o.volumeMetrics {
		registry.MustRegister(newVolumeMetrics(volumes.Traffic))
	}
	go readAhead(formatter)
	g, ctx := errgroup.WithContext(ctx)
	node := rooms{pool: p, volumes: volumes, templates: store, goldens: golden.NewStore(p), plugin: &ownPlugin{
		options: o, started: started, formatter: formatter, builder: builder, metrics: metrics, look: look,
	}}.node()
	g.Go(func() error {
		serveAdmin(ctx, p.Root(), node)
		return nil
	})
	g.Go(func() error { return lookEach(ctx, lookInterval, func() { look.healthy() }) })
	if o.trialInterval > 0 {
		g.Go(func() error { return lookEach(ctx, o.trialInterval, func() { look.try(0) }) })
	}
	if o.httpEndpoint != "" {
		l, err := net.Listen("tcp", o.httpEndpoint)
		if err != nil {
			return badFlag("http-endpoint", o.httpEndpoint, err)
		}
		klog.InfoS("Serving health and metrics", "address", l.Addr())
		pages := driver.HTTPHandler(look.ready, look.findings, registry)
		if o.profiling {
			pages = driver.WithProfiles(pages)
		}
		g.Go(func() error { return serveHTTP(ctx, l, pages) })
	}
	if o.pageEndpoint != "" {
		l, err := net.Listen("tcp", o.pageEndpoint)
		if err != nil {
			return badFlag("page-endpoint", o.pageEndpoint, err)
		}
		klog.InfoS("Serving the page", "address", l.Addr())
		host, _, _ := net.SplitHostPort(o.pageEndpoint) // Listen has split it
		g.Go(func() error { return serveHTTP(ctx, l, webpage.Handler(node, host)) })
	}
	config := driver.Config{
		Endpoint: o.endpoint, Name: o.driverName, Version: versionName(), NodeID: o.nodeID,
		Volumes: volumes, MaxVolumes: o.maxVolumes, SharedResizer: o.sharedResizer, SweepInterval: o.sweepInterval, TrimInterval: o.trimInterval,
		Health: look.healthy, Metrics: metrics, Registration: registration,
	}
	g.Go(func() error {
		prewarmer.Run(ctx)
		return nil
	})
	g.Go(func() error {
		builder.run(ctx)
		return nil
	})
	g.Go(func() error { return driver.Serve(ctx, config) })
	err = g.Wait()
	logStop(ctx, started, metrics, volumes)
	return err
}

// checkKubeletDir finds out that kubelet's directory is missing before a pool is made.
func checkKubeletDir(dir string) error {
	root, err := place.Open(dir)
	if err != nil {
		return err
	}
	return root.Close()
}

// newRegistration returns nil if the plugin is not to register itself.
func newRegistration(o pluginOptions) (*driver.Registration, error) {
	if o.registrationDir == "" {
		return nil, nil
	}
	r, err := driver.NewRegistration(o.registrationDir, o.driverName, o.endpoint)
	if err != nil {
		return nil, badFlag("registration-dir", o.registrationDir, err)
	}
	return r, nil
}

// templateConfig joins the template store to what builds templates, and the metrics.
func templateConfig(o pluginOptions, p *pool.Pool, b *builder, r prometheus.Registerer) template.Config {
	return template.Config{
		Pool:          p,
		Fingerprint:   b.fingerprint,
		Resolve:       b.resolve,
		Format:        b.format,
		Progress:      b.progress,
		MaxBuilds:     o.maxVMs * vmformat.MaxOrders, // the formatter bounds the VMs
		BuildsPerHour: o.maxBuildsPerHour,
		Budget:        templateBudget(p, o.templateCache),
		Observe:       observeBuilds(r),
		Trimmed:       observeTrims(r),
	}
}

// templateBudget returns how many bytes templates may take, or nil for no limit. It is
// computed at each call, because the pool may grow while the plugin runs. It is a share of the
// pool's own size: when somebody fills a layer below, templates that are there stay.
func templateBudget(p *pool.Pool, share size.Share) func() (int64, error) {
	if share == (size.Share{}) {
		return nil
	}
	return func() (int64, error) {
		layers, err := p.Layers()
		if err != nil {
			return 0, err
		}
		return share.Of(layers[0].Total), nil
	}
}

// readAhead makes the formatter read its files now, tens of MiB of kernel and programs, so that
// the first volume does not wait for that. Its errors are dropped: missing files were
// reported at start.
func readAhead(formatter *vmformat.Formatter) {
	for _, name := range diskfs.Names() {
		if fs, err := diskfs.Lookup(name); err == nil {
			formatter.Fingerprint(diskfs.Spec{Filesystem: name, Size: fs.DefaultSize()}, nil)
		}
	}
}

// serveAdmin answers the operator's commands. A plugin that cannot, for example on a full pool, serves pods all the same.
func serveAdmin(ctx context.Context, dir string, node admin.Node) {
	l, err := admin.Listen(ctx, dir)
	if err == nil {
		err = admin.Serve(ctx, l, node)
	}
	if err != nil {
		logs.Warn("The operator's commands cannot ask this plugin, and read the pool without it", "err", err)
	}
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	// Every pod may be able to connect. A profile takes half a minute.
	server := &http.Server{Handler: h, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 30 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
