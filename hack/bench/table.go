// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const goalsHeading = "## Goals\n"

// markdown is the table: the machine, the goals, and all series, one table for each case.
func (r report) markdown() string {
	var w strings.Builder
	w.WriteString("<!--\nCopyright The csi-disktemplate Authors.\nSPDX-License-Identifier: Apache-2.0\n-->\n\n# The last run\n\n")
	w.WriteString("Written by `make bench`; [README.md](README.md) explains it. Times are medians, with 10% and 90% of the samples below\n" +
		"the figures in parentheses, and 99% below the last one where there are 100 samples or more.\n\n")
	w.WriteString("| | |\n|---|---|\n")
	m := r.Machine
	for _, line := range [][2]string{
		{"machine", m.String()}, {"disk", m.Disk}, {"time of the processors that other programs and the kernel's threads took", fmt.Sprintf("%.0f%%", 100*m.Others)}, {"programs", strings.Join(m.Programs, "; ")},
		{"plugin", m.Plugin}, {"commit", m.Commit}, {"run", fmt.Sprintf("%s, %d s, `bench %s`, seed %d", m.Date, m.Seconds, strings.Join(m.Command, " "), m.Seed)},
	} {
		fmt.Fprintf(&w, "| %s | %s |\n", line[0], line[1])
	}
	for _, f := range r.Failures {
		fmt.Fprintf(&w, "| **failed** | %s |\n", f)
	}
	w.WriteString("\n" + goalsHeading + "\n| | pool | volume | beside | measured | (range) | of | to | goal | met |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, g := range r.Goals {
		fmt.Fprintf(&w, "| %s | %s | %s | %s | **%s** | %s–%s | %s | %s | %s | %s |\n", g.Row, g.Pool, g.FS, count(g.At), figure(g.Value), figure(g.Low), figure(g.High),
			figure(g.Of), orNone(g.To), g.Goal, map[bool]string{true: "yes", false: "**no**"}[g.Met])
	}
	for _, c := range cases {
		r.caseTable(&w, c)
	}
	return w.String()
}

// caseTable has a row for each pool, filesystem and place, and a column for each way.
func (r report) caseTable(w *strings.Builder, c benchCase) {
	var ways []string
	rows := map[key]map[string]series{}
	var order []key
	for _, s := range r.Series {
		if s.Case != c.name {
			continue
		}
		if !slices.Contains(ways, s.Way) {
			ways = append(ways, s.Way)
		}
		row := s.key
		row.Way = ""
		if rows[row] == nil {
			rows[row] = map[string]series{}
			order = append(order, row)
		}
		rows[row][s.Way] = s
	}
	if len(order) == 0 {
		return
	}
	slices.SortFunc(ways, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	slices.SortStableFunc(order, func(a, b key) int { return cmp.Or(cmp.Compare(a.What, b.What), cmp.Compare(a.Pool, b.Pool)) })
	fmt.Fprintf(w, "\n## %s\n\n| | pool | volume | beside |", c.title)
	for _, way := range ways {
		fmt.Fprintf(w, " %s |", way)
	}
	fmt.Fprintf(w, "\n|---|---|---|---|%s\n", strings.Repeat("---|", len(ways)))
	for _, row := range order {
		what := row.What
		if u := unit(what); u != "" {
			what += ", " + u
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s |", what, row.Pool, row.FS, count(row.At))
		for _, way := range ways {
			fmt.Fprintf(w, " %s |", rows[row][way])
		}
		w.WriteString("\n")
	}
}

// rank is the order of the columns.
func rank(way string) int {
	i := slices.Index(wayNames, way)
	if i < 0 {
		return 99
	}
	return i
}

func (s series) String() string {
	switch {
	case s.N == 0:
		return ""
	case s.N == 1:
		return figure(s.Median)
	case s.P99 > 0:
		return fmt.Sprintf("%s (%s–%s; %s)", figure(s.Median), figure(s.P10), figure(s.P90), figure(s.P99))
	}
	return fmt.Sprintf("%s (%s–%s)", figure(s.Median), figure(s.P10), figure(s.P90))
}

// figure writes a number with as many digits as it deserves.
func figure(x float64) string {
	digits := 2
	for limit := 10.0; x >= limit && digits > 0; limit *= 10 {
		digits--
	}
	return strconv.FormatFloat(x, 'f', digits, 64)
}

func count(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func orNone(x float64) string {
	if x == 0 {
		return ""
	}
	return figure(x)
}
