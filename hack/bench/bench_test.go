// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestDocsQuoteLastRun: the figures of the README are those of docs/bench.
func TestDocsQuoteLastRun(t *testing.T) {
	r, err := readReport("../../docs/bench/latest.json")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, got, _, err := cutQuote(string(text))
	if err != nil {
		t.Fatal(err)
	}
	if want := quote(r); got != want {
		t.Errorf("README.md quotes\n%s\nbut the last run in docs/bench says\n%s\nrun `go run ./hack/bench --out docs/bench --quote README.md`", got, want)
	}
	for _, s := range r.Series {
		if s.Median == 0 && s.Case == "life" {
			t.Errorf("%+v has no figure", s.key)
		}
	}
}

func TestQuantile(t *testing.T) {
	samples := []float64{1, 2, 3, 4, 5}
	for q, want := range map[float64]float64{0: 1, 0.1: 1.4, 0.5: 3, 0.9: 4.6, 1: 5} {
		if got := quantile(samples, q); got < want-1e-9 || got > want+1e-9 {
			t.Errorf("quantile %g is %g, not %g", q, got, want)
		}
	}
	if got := quantile([]float64{7}, 0.99); got != 7 {
		t.Errorf("the quantile of one sample is %g", got)
	}
}

func TestRatio(t *testing.T) {
	of, to := []float64{2, 2.2, 1.8, 2, 2.4}, []float64{1, 1, 1, 1, 1}
	r := ratioOf(of, to, median, median)
	if r.Value != 2 || r.Low < 1.8 || r.High > 2.4 || r.Low > r.Value || r.High < r.Value {
		t.Errorf("the ratio is %+v", r)
	}
	if again := ratioOf(of, to, median, median); again != r {
		t.Errorf("the same samples give %+v and %+v", r, again)
	}
}

// recorded is a run with samples, of which the first of each pair is 2 at all places but the last, where it is 3.
func recorded(c string) *bench {
	b := &bench{samples: map[key][]float64{}}
	for _, at := range []int{1, 1000} {
		for _, way := range []string{plugin, floor} {
			k := key{Case: c, Pool: "ram-xfs", FS: "ext4", What: "publish", Way: way, At: at}
			x := 1.0
			if way == plugin {
				x = 2 + float64(at/1000)
			}
			b.add(k, x)
		}
	}
	return b
}

func TestResults(t *testing.T) {
	b := recorded("crowd")
	c := cases[slices.IndexFunc(cases, func(c benchCase) bool { return c.name == "crowd" })]
	for _, w := range []struct {
		g    goal
		of   float64
		want float64
		met  bool
	}{
		{goal{of: term{what: "publish", way: plugin, at: most}, to: term{what: "publish", way: floor, at: most}, bound: atMost(3)}, 3, 3, true},
		{goal{of: term{what: "publish", way: plugin, at: most}, to: term{what: "publish", way: plugin, at: few}, bound: atMost(1.2)}, 3, 1.5, false},
		{goal{of: term{what: "publish", way: plugin, at: few}, bound: atLeast(2)}, 2, 2, true},
		{goal{of: term{what: "publish", way: plugin, at: most}, bound: atMost(5).reaching(1001)}, 3, 3, false},
	} {
		got := b.results(c, w.g)
		if len(got) != 1 || got[0].Of != w.of || got[0].Value != w.want || got[0].Met != w.met {
			t.Errorf("%+v: %+v", w, got)
		}
	}
	for _, g := range []goal{
		{of: term{what: "publish", way: habit}, bound: atMost(1)},
		{of: term{what: "publish", way: plugin}, to: term{what: "publish", way: habit}, bound: atMost(1)},
		{of: term{what: "publish", way: plugin}, bound: atMost(1), without: "ext4"},
	} {
		if got := b.results(c, g); got != nil {
			t.Errorf("%+v: %+v", g, got)
		}
	}
}

// TestNames: what differs only inside a volume takes no part in the cases about lives, whose figures would say nothing new.
func TestNames(t *testing.T) {
	d := bed{ways: map[string]way{volatile: nil, tmpfs: nil, plugin: nil, floor: nil, habit: nil}}
	if got, want := d.names(habit), []string{floor, plugin}; !slices.Equal(got, want) {
		t.Errorf("%v take part, not %v", got, want)
	}
}

// TestCasesAreWhole: a case without a measurement, or a goal without a bound, would go unnoticed.
func TestCasesAreWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases {
		if seen[c.name] || c.title == "" || c.run == nil {
			t.Errorf("the case %q", c.name)
		}
		seen[c.name] = true
		for _, g := range c.goals {
			if g.row == "" || g.of.what == "" || g.limit == 0 {
				t.Errorf("the case %s has the goal %+v", c.name, g)
			}
		}
	}
}

// TestPowerOff: the kernel runs the program that the VM's floor has as init only if it is an executable file.
func TestPowerOff(t *testing.T) {
	f, err := elf.NewFile(bytes.NewReader(powerOff()))
	if err != nil {
		t.Fatal(err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC || len(f.Progs) != 1 || f.Entry < f.Progs[0].Vaddr || f.Entry >= f.Progs[0].Vaddr+f.Progs[0].Filesz {
		t.Errorf("the program is %+v with %+v", f.FileHeader, f.Progs)
	}
}

// TestTransactions: pgbench's report has other figures beside the one that counts.
func TestTransactions(t *testing.T) {
	const out = "latency average = 2.974 ms\ninitial connection time = 8.061 ms\ntps = 1344.852411 (without initial connection time)\n"
	if got, err := transactions(out); err != nil || got != 1344.852411 {
		t.Errorf("%g transactions a second, %v", got, err)
	}
	if got, err := transactions("pgbench: error: client 0 aborted"); err == nil {
		t.Errorf("a report without a rate says %g", got)
	}
}

// TestForks: threads, and processes of others, do not count.
func TestForks(t *testing.T) {
	event := func(what, parent, child, childThread int32) []byte {
		m := make([]byte, nlHeader+cnHeader+eventHeader+16)
		put := func(at int, x int32) {
			copy(m[nlHeader+cnHeader+at:], []byte{byte(x), byte(x >> 8), byte(x >> 16), byte(x >> 24)})
		}
		put(0, what)
		put(eventHeader+4, parent)
		put(eventHeader+8, childThread)
		put(eventHeader+12, child)
		return m
	}
	family := map[int32]bool{7: true}
	for _, c := range []struct {
		m    []byte
		want int
	}{
		{event(procEventFork, 7, 8, 8), 1},
		{event(procEventFork, 8, 9, 9), 1}, // a child's child
		{event(procEventFork, 7, 7, 10), 0},
		{event(procEventFork, 6, 11, 11), 0},
		{event(2, 7, 12, 12), 0},
		{nil, 0},
	} {
		if got := forks(c.m, family); got != c.want {
			t.Errorf("%v counts as %d", c.m, got)
		}
	}
}

// TestMixture: the same seed makes the same archive, with the files that are asked for.
func TestMixture(t *testing.T) {
	m := mixture{8 << 20, 40}
	var archives [2][]byte
	for i := range archives {
		path := filepath.Join(t.TempDir(), "files.tar")
		if err := m.write(path, 7); err != nil {
			t.Fatal(err)
		}
		var err error
		if archives[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two archives of one seed differ")
	}
	var total int64
	small := 0
	for r := tar.NewReader(bytes.NewReader(archives[0])); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		total += h.Size
		if h.Size >= smallLeast && h.Size < smallMost {
			small++
		}
	}
	if total != m.bytes || small < m.small {
		t.Errorf("%d bytes in all, and %d small files, of %+v", total, small, m)
	}
}

// TestFill: a job leaves the files of the archive, and one that rewrites a tenth of them changes no more than that, and
// no file's size.
func TestFill(t *testing.T) {
	m, dir, archive := mixture{64 << 20, 40}, t.TempDir(), filepath.Join(t.TempDir(), "files.tar")
	if err := errors.Join(m.fill(dir, 7), m.write(archive, 7)); err != nil {
		t.Fatal(err)
	}
	if changed := differ(t, archive, dir); changed != 0 {
		t.Errorf("%d bytes differ between the directory and the archive", changed)
	}
	if err := m.rewrite(dir, 8); err != nil {
		t.Fatal(err)
	}
	if changed := differ(t, archive, dir); changed < m.changed()/2 || changed > m.changed() {
		t.Errorf("%d bytes were changed, of %d that were to be", changed, m.changed())
	}
}

// differ counts the bytes in which files of a directory differ from an archive.
func differ(t *testing.T, archive, dir string) (bytes int64) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return bytes
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		had, err := io.ReadAll(r)
		has, err2 := os.ReadFile(filepath.Join(dir, h.Name))
		if err := errors.Join(err, err2); err != nil || len(had) != len(has) {
			t.Fatalf("%s has %d bytes, not %d: %v", h.Name, len(has), len(had), err)
		}
		for i := range had {
			if had[i] != has[i] {
				bytes++
			}
		}
	}
}

// TestUnits: a series for a content or a golden has the unit of the series without it.
func TestUnits(t *testing.T) {
	for what, want := range map[string]string{
		"publish": "ms", largeContent.with(cold): "ms", smallContent.with(warm): "ms", smallContent.with("extents"): "",
		quickUnpackContent.with(unpacked): "s", "pgbench": "1/s",
		largeContent.golden(cold): "ms", smallContent.golden(warm): "ms", smallContent.golden("extents"): "",
		largeContent.golden(unpublishChanged): "ms", largeContent.golden(commitOfRewritten): "s",
	} {
		if got := unit(what); got != want {
			t.Errorf("%s is in %q, not %q", what, got, want)
		}
	}
}

// TestQuoteLeavesOut: a row that was not measured says nothing, and neither does a filesystem.
func TestQuoteLeavesOut(t *testing.T) {
	k := key{Case: "life", Pool: quotedPool, FS: "xfs", What: "publish", Way: plugin}
	got := quote(report{Series: []series{{key: k, Median: 3}}})
	if want := "|---|---|---|---|\n| inline volume published, made on demand |  | 3.00 |  |\n"; !strings.HasSuffix(got, want) {
		t.Errorf("the quotation is\n%s", got)
	}
}
