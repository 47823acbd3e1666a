// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// pattern is one job of fio. Its figure is I/O operations a second, or MiB a second.
type pattern struct {
	name string
	args []string
	side string // of fio's report
	rate func(fioSide) float64
}

type fioSide struct {
	IOPS    float64 `json:"iops"`
	BWBytes float64 `json:"bw_bytes"`
}

func operations(s fioSide) float64 { return s.IOPS }
func mebibytes(s fioSide) float64  { return s.BWBytes / (1 << 20) }

var patterns = []pattern{
	{"4 KiB random read", []string{"--rw=randread", "--bs=4k", "--iodepth=16"}, "read", operations},
	{"4 KiB random write", []string{"--rw=randwrite", "--bs=4k", "--iodepth=16"}, "write", operations},
	{"1 MiB sequential read", []string{"--rw=read", "--bs=1m", "--iodepth=4"}, "read", mebibytes},
	{"1 MiB sequential write", []string{"--rw=write", "--bs=1m", "--iodepth=4"}, "write", mebibytes},
}

// fioMiB is the size of the file.
const fioMiB = 512

// inside measures I/O of a file in an ext4 volume, and of a file in the pool itself, which has no loop device between.
func inside(ctx context.Context, b *bench, d *bed) error {
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("%w: %w", errMissing, err)
	}
	w, v := d.ways[plugin], d.volume("ext4", volumeSize)
	if err := w.prepare(v); err != nil {
		return err
	}
	if err := w.publish(ctx, v); err != nil {
		return err
	}
	files := map[string]string{plugin: filepath.Join(v.target, "fio"), floor: filepath.Join(d.beside, "fio")}
	for _, path := range files {
		if err := fill(path, fioMiB); err != nil {
			return err
		}
		if err := syncFS(filepath.Dir(path)); err != nil {
			return err
		}
	}
	for range b.rounds(3, 1, 20*time.Second) {
		for _, p := range patterns {
			for _, name := range b.shuffled([]string{plugin, floor}) {
				x, err := p.run(ctx, files[name])
				if err != nil {
					return err
				}
				b.add(key{Case: "inside", Pool: d.kind.name, FS: "ext4", What: p.name, Way: name}, x)
			}
		}
	}
	if _, err := run(ctx, "rm", files[floor]); err != nil {
		return err
	}
	return b.takeAway(ctx, w, []*volume{v})
}

// run runs the pattern on a file for a second, unless it says otherwise: of two equal options fio takes the last.
func (p pattern) run(ctx context.Context, file string) (float64, error) {
	line := []string{"fio", "--name=bench", "--filename=" + file, "--direct=1", "--ioengine=libaio", "--output-format=json",
		"--time_based", "--runtime=1", fmt.Sprintf("--size=%dM", fioMiB), "--randrepeat=0"}
	out, err := run(ctx, append(slices.Clone(line), p.args...)...)
	if err != nil {
		return 0, err
	}
	var report struct {
		Jobs []map[string]json.RawMessage `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil || len(report.Jobs) != 1 {
		return 0, fmt.Errorf("fio's report is not understood (%w): %.200s", err, out)
	}
	var side fioSide
	if err := json.Unmarshal(report.Jobs[0][p.side], &side); err != nil {
		return 0, err
	}
	return p.rate(side), nil
}
