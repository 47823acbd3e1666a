// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
)

// goldenOptions are the flags of goldens.
type goldenOptions struct {
	on               bool
	shared           string
	cache, namespace size.Share
	bytes            int64
	generations      int
	unused           time.Duration
}

func addGoldens(f *pflag.FlagSet, o *goldenOptions) {
	f.BoolVar(&o.on, "goldens", false, "volumes may start from what an earlier one of their namespace left, and leave something for the next")
	f.StringVar(&o.shared, "shared-goldens", "", "file that names the goldens of several namespaces, and who may start from each and commit to it; it is read again when it changes (default: none)")
	addValue(f, &o.cache, "golden-cache", "20%", poolShare,
		"space of the pool that goldens may take, a quantity or a percentage; each namespace has a right to an equal share; 0 means no limit")
	addValue(f, &o.namespace, "golden-namespace-cache", "10%", poolShare,
		"the same for one namespace, and for one shared golden; the least recently used are removed first; 0 means no limit")
	addValue(f, &o.bytes, "golden-max-bytes", "0", upperSize, "space that one golden may take with all its generations, as 10Gi; 0 means no limit")
	addValue(f, &o.generations, "golden-generations", "2", upperCount[int](), "how many generations of a golden are kept; 0 means no limit")
	addValue(f, &o.unused, "golden-max-age", "168h", interval, "time after which a golden is removed that no volume started from; 0 means never")
}

// goldens are [volume.Config].Goldens, or nil if they are off, and the conditions of the list of shared ones.
func (o goldenOptions) goldens(p *pool.Pool) (*volume.Goldens, func() []health.Condition, error) {
	if !o.on {
		if o.shared != "" {
			return nil, nil, badFlag("shared-goldens", o.shared, fmt.Errorf("is for a node with goldens; give --goldens too"))
		}
		return nil, func() []health.Condition { return nil }, nil
	}
	sharing := golden.OpenSharing(o.shared)
	return &volume.Goldens{
		Limits:    func() (golden.Limits, error) { return o.limits(p) },
		CheckRead: sharing.CheckRead, CheckWrite: sharing.CheckWrite,
	}, sharing.Conditions, nil
}

// requirement is that commits and the list of shared goldens are well; the zero value if goldens are off.
func (o goldenOptions) requirement(volumes *volume.Manager, sharing func() []health.Condition) health.Requirement {
	if !o.on {
		return health.Requirement{}
	}
	return health.Requirement{Name: "goldens", Look: joined(volumes.GoldenHealth, sharing), Good: func() string {
		return "no commit has failed, and all shared goldens that are listed can be used"
	}}
}

// limits are those of this moment: a loopback pool may grow while the plugin runs.
func (o goldenOptions) limits(p *pool.Pool) (golden.Limits, error) {
	layers, err := p.Layers()
	if err != nil {
		return golden.Limits{}, err
	}
	total := layers[0].Total
	return golden.Limits{
		Generations: o.generations, Unused: o.unused, Golden: o.bytes, Owner: o.namespace.Of(total), All: o.cache.Of(total),
	}, nil
}

var (
	goldenCount = prometheus.NewDesc("csi_disktemplate_goldens", "Generations of goldens in the pool.", nil, nil)
	goldenBytes = prometheus.NewDesc("csi_disktemplate_golden_bytes",
		"Space that goldens have allocated; extents that several of them share count several times.", nil, nil)
	commitCount   = prometheus.NewDesc("csi_disktemplate_commits_total", "Volumes with commitTo that ended, by what became of them.", []string{"outcome"}, nil)
	commitWaiting = prometheus.NewDesc("csi_disktemplate_commits_waiting", "Volumes that ended and wait for their commit.", nil, nil)
)

// goldenMetrics are the metrics of goldens.
type goldenMetrics struct{ volumes *volume.Manager }

func (m goldenMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{goldenCount, goldenBytes, commitCount, commitWaiting} {
		ch <- d
	}
}

func (m goldenMetrics) Collect(ch chan<- prometheus.Metric) {
	counts, waiting := m.volumes.Commits()
	for o, n := range counts {
		ch <- prometheus.MustNewConstMetric(commitCount, prometheus.CounterValue, float64(n), string(o))
	}
	ch <- prometheus.MustNewConstMetric(commitWaiting, prometheus.GaugeValue, float64(waiting))
	all, err := m.volumes.Goldens()
	if err != nil {
		return // an error here would take all other metrics along, also the condition that says why
	}
	bytes := int64(0)
	for _, h := range all {
		bytes += h.Bytes
	}
	ch <- prometheus.MustNewConstMetric(goldenCount, prometheus.GaugeValue, float64(len(all)))
	ch <- prometheus.MustNewConstMetric(goldenBytes, prometheus.GaugeValue, float64(bytes))
}
