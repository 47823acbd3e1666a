// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// report is the JSON.
type report struct {
	Machine  machine  `json:"machine"`
	Goals    []result `json:"goals"`
	Series   []series `json:"series"`
	Failures []string `json:"failures,omitempty"`
}

// jsonName is the name of the report in --out.
const jsonName = "latest.json"

// series sums up samples.
type series struct {
	key
	Unit   string  `json:"unit"`
	N      int     `json:"n"`
	Median float64 `json:"median"`
	P10    float64 `json:"p10"`
	P90    float64 `json:"p90"`
	P99    float64 `json:"p99,omitempty"` // of 100 samples or more
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// result is a goal and what came of it.
type result struct {
	Row  string `json:"row"`
	Case string `json:"case"`
	Pool string `json:"pool,omitempty"`
	FS   string `json:"fs,omitempty"`
	At   int    `json:"at,omitempty"`
	ratio
	Of   float64 `json:"of"`           // the median, or another quantile, that the goal is about
	To   float64 `json:"to,omitempty"` // what it is compared with
	Goal string  `json:"goal"`
	Met  bool    `json:"met"`
}

func (b *bench) report() report {
	r := report{Machine: b.describe(), Failures: b.failures}
	for _, k := range b.order {
		r.Series = append(r.Series, sumUp(k, b.samples[k]))
	}
	for _, c := range cases {
		for _, g := range c.goals {
			r.Goals = append(r.Goals, b.results(c, g)...)
		}
	}
	return r
}

func sumUp(k key, samples []float64) series {
	sorted := slices.Sorted(slices.Values(samples))
	s := series{
		key: k, Unit: unit(k.What), N: len(sorted), Median: quantile(sorted, 0.5), P10: quantile(sorted, 0.1), P90: quantile(sorted, 0.9),
		Min: sorted[0], Max: sorted[len(sorted)-1],
	}
	if s.N >= 100 {
		s.P99 = quantile(sorted, 0.99)
	}
	return s
}

// results is a goal on each pool and for each filesystem that were measured.
func (b *bench) results(c benchCase, g goal) (all []result) {
	type row struct{ pool, fs string }
	var done []row
	for _, k := range b.order {
		r := row{k.Pool, k.FS}
		if k.Case != c.name || k.What != g.of.what || k.Way != g.of.way || slices.Contains(done, r) || !g.wants(k.FS) {
			continue
		}
		done = append(done, r)
		if x, ok := b.result(c, g, k); ok {
			all = append(all, x)
		}
	}
	return all
}

func (b *bench) result(c benchCase, g goal, k key) (result, bool) {
	at, of := b.at(k, g.of)
	r := result{Row: g.row, Case: c.name, Pool: k.Pool, FS: k.FS, At: at, Of: g.of.of(of), Goal: g.bound.String()}
	r.ratio = ratio{r.Of, slices.Min(of), slices.Max(of)}
	if g.to != (term{}) {
		_, to := b.at(k, g.to)
		if to == nil {
			return result{}, false
		}
		r.To, r.ratio = g.to.of(to), ratioOf(of, to, g.of.of, g.to.of)
	}
	r.Met = g.met(r.Value, at)
	return r, true
}

// at finds the samples that a term names, on the pool and filesystem of a key.
func (b *bench) at(k key, t term) (at int, samples []float64) {
	var places []int
	for _, o := range b.order {
		if o.Case == k.Case && o.Pool == k.Pool && o.FS == k.FS && o.What == t.what && o.Way == t.way {
			places = append(places, o.At)
		}
	}
	if len(places) == 0 {
		return 0, nil
	}
	at = slices.Max(places)
	if t.at == few {
		at = slices.Min(places)
	}
	return at, b.samples[key{k.Case, k.Pool, k.FS, t.what, t.way, at}]
}

// write writes the table, the JSON and the plots.
func (b *bench) write() error {
	if len(b.order) == 0 {
		return errors.New("nothing was measured")
	}
	if err := os.MkdirAll(b.o.out, 0o755); err != nil {
		return err
	}
	r := b.report()
	out, err := r.json()
	if err != nil {
		return err
	}
	table := r.markdown()
	os.Stdout.WriteString("\n" + goalsOnly(table))
	return errors.Join(
		os.WriteFile(filepath.Join(b.o.out, jsonName), out, 0o644),
		os.WriteFile(filepath.Join(b.o.out, "latest.md"), []byte(table), 0o644),
		b.plots(),
	)
}

// json is the report with one line for each goal and each series, so that two runs can be compared line by line.
func (r report) json() ([]byte, error) {
	goals, err := lines(r.Goals)
	if err != nil {
		return nil, err
	}
	all, err := lines(r.Series)
	if err != nil {
		return nil, err
	}
	m, err := json.MarshalIndent(r.Machine, "", " ")
	if err != nil {
		return nil, err
	}
	failures, err := json.Marshal(r.Failures)
	return fmt.Appendf(nil, "{\n\"machine\": %s,\n\"goals\": %s,\n\"series\": %s,\n\"failures\": %s\n}\n", m, goals, all, failures), err
}

func lines[T any](all []T) (string, error) {
	var rows []string
	for _, x := range all {
		row, err := json.Marshal(x)
		if err != nil {
			return "", err
		}
		rows = append(rows, string(row))
	}
	return "[\n" + strings.Join(rows, ",\n") + "\n]", nil
}

// goalsOnly is the part of the table that a terminal shows.
func goalsOnly(table string) string {
	_, rest, _ := strings.Cut(table, goalsHeading)
	goals, _, _ := strings.Cut(rest, "\n## ")
	return strings.TrimSpace(goals) + "\n"
}
