// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// volumeMetrics count what each attached volume does. They are five series for each volume that ever was on the
// node: with 500 pods an hour, Prometheus keeps 60,000 of a day for one node. They also name pods. So
// --volume-metrics has to ask for them.
type volumeMetrics struct {
	look func() ([]volume.Traffic, error)

	mu   sync.Mutex // one look at a time
	last map[attachment]loopdev.Stats
	sums map[string]loopdev.Stats // by volume
}

// attachment is that of a volume to a loop device. Counters of the device go on from its volume before.
type attachment struct {
	volume string
	loop   int
	number uint64
}

func newVolumeMetrics(look func() ([]volume.Traffic, error)) *volumeMetrics {
	return &volumeMetrics{look: look}
}

// volumeLabels are the labels of each series. An inline volume has a pod, and a claim a PersistentVolume. The
// plugin does not know the namespace of a claim.
var volumeLabels = []string{"volume", "namespace", "pod", "persistentvolume"}

func volumeCounter(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("csi_disktemplate_volume_"+name+"_total", help+", since the plugin saw the volume first.", volumeLabels, nil)
}

var (
	volumeReads   = volumeCounter("reads", "Reads that a volume's loop device completed")
	volumeWrites  = volumeCounter("writes", "Writes that a volume's loop device completed")
	volumeRead    = volumeCounter("read_bytes", "Bytes that were read from a volume's loop device")
	volumeWritten = volumeCounter("written_bytes", "Bytes that were written to a volume's loop device")
	volumeBusy    = volumeCounter("busy_seconds", "Time in which a volume's loop device had requests under way")
)

func (m *volumeMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{volumeReads, volumeWrites, volumeRead, volumeWritten, volumeBusy} {
		ch <- d
	}
}

func (m *volumeMetrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	seen, err := m.look()
	if err != nil {
		return // a condition says why
	}
	m.add(seen)
	sent := map[string]bool{}
	for _, t := range seen {
		if !sent[t.Record.ID] {
			sent[t.Record.ID] = true
			send(ch, t.Record, m.sums[t.Record.ID])
		}
	}
}

// add adds what was done since the last look, and forgets volumes that are gone. The first look at an attachment
// counts for nothing: every series begins at 0.
func (m *volumeMetrics) add(seen []volume.Traffic) {
	last, sums := map[attachment]loopdev.Stats{}, map[string]loopdev.Stats{}
	for _, t := range seen {
		at := attachment{t.Record.ID, t.Loop.Index, t.Loop.Number}
		sum, counted := sums[at.volume]
		if !counted {
			sum = m.sums[at.volume]
		}
		if before, known := m.last[at]; known {
			sum = sum.Plus(t.Stats.Minus(before))
		}
		last[at], sums[at.volume] = t.Stats, sum
	}
	m.last, m.sums = last, sums
}

func send(ch chan<- prometheus.Metric, r image.Record, s loopdev.Stats) {
	pv := ""
	if r.Lifecycle == image.Claim {
		pv = r.Name
	}
	for desc, value := range map[*prometheus.Desc]float64{
		volumeReads: float64(s.Reads), volumeWrites: float64(s.Writes),
		volumeRead: float64(s.ReadBytes), volumeWritten: float64(s.WrittenBytes), volumeBusy: s.Busy.Seconds(),
	} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, value, r.ID, r.Pod.Namespace, r.Pod.Name, pv)
	}
}
