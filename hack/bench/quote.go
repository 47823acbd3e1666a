// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// The lines between which a document quotes the last run.
const (
	quoteBegins = "<!-- bench: written by `make bench-docs` -->\n"
	quoteEnds   = "<!-- /bench -->\n"
)

// quotedPool is the pool whose figures are quoted: the default one of the manifests is an xfs, and on a disk.
const quotedPool = "disk-xfs"

// quoted are the rows of the quoted table, as users know them. A template is built without a pool.
var quoted = []struct {
	name, pool string
	key
}{
	{"inline volume published, of those that are ready", quotedPool, key{Case: "warm", What: "publish", Way: ready}},
	{"inline volume published, made on demand", quotedPool, key{Case: "life", What: "publish", Way: plugin}},
	{"the same system calls, made straight", quotedPool, key{Case: "life", What: "publish", Way: floor}},
	{"mkfs, losetup and mount instead", quotedPool, key{Case: "life", What: "publish", Way: habit}},
	{"cp --reflink of a formatted image, losetup and mount instead", quotedPool, key{Case: "life", What: "publish", Way: otherHabit}},
	{"inline volume unpublished", quotedPool, key{Case: "life", What: "unpublish", Way: plugin}},
	{"claim created, staged and published", quotedPool, key{Case: "life", What: "publish", Way: claim}},
	{"volume with 10 GiB of content published, of those that are ready", quotedPool,
		key{Case: "contents", What: largeContent.with(warm), Way: full}},
	{"volume with 10 GiB of content published, made on demand", quotedPool,
		key{Case: "contents", What: largeContent.with(cold), Way: full}},
	{"empty volume of the same size published, made on demand", quotedPool,
		key{Case: "contents", What: largeContent.with(cold), Way: empty}},
	{"volume from a golden of 10 GiB published, of those that are ready", quotedPool,
		key{Case: "goldens", What: largeContent.golden(warm), Way: golden}},
	{"volume from a golden of 10 GiB published, made on demand", quotedPool,
		key{Case: "goldens", What: largeContent.golden(cold), Way: golden}},
	{"100 volumes with a PostgreSQL data directory published at once, ready", quotedPool,
		key{Case: "contents-databases", What: allDatabases, Way: ready}},
	{"first template of a filesystem after the plugin's start", "", key{Case: "template", What: "template build", Way: plugin}},
	{"first volume of another size, with its template", "ram-xfs", key{Case: "sizes", What: "one alone", Way: plugin}},
	{"the formatting VM's kernel booted and powered off, no more", "ram-xfs", key{Case: "sizes", What: "one alone", Way: floor}},
}

// quoteIn replaces the quotation in a document.
func quoteIn(document, from string) error {
	r, err := readReport(from)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	before, _, after, err := cutQuote(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", document, err)
	}
	return os.WriteFile(document, []byte(before+quoteBegins+quote(r)+quoteEnds+after), 0o644)
}

func readReport(path string) (r report, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(b, &r)
}

// cutQuote finds the quotation in a text.
func cutQuote(text string) (before, quotation, after string, err error) {
	before, rest, ok := strings.Cut(text, quoteBegins)
	quotation, after, ends := strings.Cut(rest, quoteEnds)
	if !ok || !ends {
		return "", "", "", fmt.Errorf("the lines %q and %q are missing", strings.TrimSpace(quoteBegins), strings.TrimSpace(quoteEnds))
	}
	return before, quotation, after, nil
}

// quote is what a document quotes of a run. What the run did not measure is left out.
func quote(r report) string {
	var w strings.Builder
	fmt.Fprintf(&w, "| 1 GiB, xfs pool on a disk; medians in ms | %s |\n|---|---|---|---|\n", strings.Join(filesystems, " | "))
	for _, q := range quoted {
		var row strings.Builder
		measured := false
		for _, fs := range filesystems {
			k := q.key
			k.Pool, k.FS = q.pool, fs
			x := r.median(k)
			measured = measured || x > 0
			fmt.Fprintf(&row, " %s |", orNone(x))
		}
		if measured {
			fmt.Fprintf(&w, "| %s |%s\n", q.name, row.String())
		}
	}
	return w.String()
}

// median is that of a series, or 0.
func (r report) median(k key) float64 {
	for _, s := range r.Series {
		if s.key == k {
			return s.Median
		}
	}
	return 0
}
