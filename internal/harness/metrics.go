// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
)

// AnyPort are flags for a plugin that is asked for its [Plugin.Metrics].
var AnyPort = []string{"--http-endpoint", "127.0.0.1:0"}

var (
	serving = regexp.MustCompile(`"Serving health and metrics" address="([^"]+)"`)
	sample  = regexp.MustCompile(`^(\w+)(?:\{.*\})? (\S+)`)
)

// Metrics reads the metrics of a plugin that was started with [AnyPort]: of each name the sum over all labels.
func (p *Plugin) Metrics() (map[string]float64, error) {
	log, err := os.ReadFile(p.Log)
	if err != nil {
		return nil, err
	}
	at := serving.FindSubmatch(log)
	if at == nil {
		return nil, fmt.Errorf("%s tells no address of /metrics", p.Log)
	}
	answer, err := http.Get("http://" + string(at[1]) + "/metrics")
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	sums := map[string]float64{}
	lines := bufio.NewScanner(answer.Body)
	for lines.Scan() {
		m := sample.FindStringSubmatch(lines.Text())
		if m == nil {
			continue // a comment
		}
		value, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, fmt.Errorf("the metric %q: %w", lines.Text(), err)
		}
		sums[m[1]] += value
	}
	return sums, lines.Err()
}

// AllReady reports whether a plugin keeps volumes ready, and none is missing. One that does not answer has none.
func (p *Plugin) AllReady() bool {
	sums, err := p.Metrics()
	level := sums["csi_disktemplate_warm_level"]
	return err == nil && level > 0 && sums["csi_disktemplate_warm_volumes"] == level
}
