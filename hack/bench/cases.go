// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

// benchCase is one measurement: what it does, on which pools, and what its numbers should come to.
type benchCase struct {
	name  string
	title string
	pools *regexp.Regexp // nil: all
	run   func(ctx context.Context, b *bench, d *bed) error
	goals []goal
}

// goal is a row of the table of goals: a ratio of two medians, or one median, and its bound.
type goal struct {
	row string
	of  term
	to  term // zero: the goal is about the value itself
	bound
	without string // a filesystem that has no such goal
}

func (g goal) wants(fs string) bool { return g.without == "" || fs != g.without }

// term says which of a case's series is meant. Pool and filesystem are those of the row.
type term struct {
	what, way string
	at        place
	q         float64 // the quantile; 0 is the median
}

// of is the value that the term means.
func (t term) of(samples []float64) float64 {
	q := t.q
	if q == 0 {
		q = 0.5
	}
	return quantile(slices.Sorted(slices.Values(samples)), q)
}

// place is where on a growth curve.
type place int

const (
	anywhere place = iota
	few            // the least of the curve
	most           // the most that was reached
)

// bound is what a number must be.
type bound struct {
	limit   float64
	atLeast bool // otherwise at most
	needsAt int  // the growth curve must have reached this far
}

func atMost(x float64) bound  { return bound{limit: x} }
func atLeast(x float64) bound { return bound{limit: x, atLeast: true} }

func (b bound) reaching(n int) bound {
	b.needsAt = n
	return b
}

func (b bound) met(x float64, at int) bool {
	return at >= b.needsAt && (b.atLeast && x >= b.limit || !b.atLeast && x <= b.limit)
}

func (b bound) String() string {
	sign := "≤"
	if b.atLeast {
		sign = "≥"
	}
	s := fmt.Sprintf("%s %s", sign, figure(b.limit))
	if b.needsAt > 0 {
		s += fmt.Sprintf(" at %d", b.needsAt)
	}
	return s
}

// units of what is measured.
var units = map[string]string{
	"publish": "ms", "unpublish": "ms", "publish, seen": "ms",
	"unpublish, 800 MiB dirty": "ms", "written by it": "MiB",
	"CPU": "ms", "processes": "", "space": "KiB",
	"CreateVolume": "ms", "publish, 100 at once": "ms", "a call that does nothing": "ms", "GetCapacity": "ms", "ListVolumes": "ms",
	"template build": "ms", "template build, cold": "ms", "one alone": "ms", "one alone, first": "ms",
	"checkout of 5000 files": "s", "build of 5000 objects": "s",
	"all published": "s", "each waited": "s", "done": "",
	"HWM, first build": "MiB", "HWM": "MiB", "RSS": "MiB",
	"ready after restart": "ms", "sweep": "ms", "initdb": "ms",
	"1 MiB sequential read": "MiB/s", "1 MiB sequential write": "MiB/s",
	warm: "ms", "first of its kind": "s", "extents": "", diskExtents: "", diskPublished: "ms", blockCreated: "ms",
	allDatabases: "ms", eachDatabase: "ms", unpacked: "s",
	unpublishChanged: "ms", commitOfAll: "s", commitOfNew: "s", commitOfRewritten: "s",
}

// crowdSize and claimCount are the ends of the growth curves.
const (
	crowdSize  = 1000
	claimCount = 10000
)

// ramXFS is where the cases run that do not depend on the pool: where the disk hides least. diskXFS is where programs run
// in a volume: on a pool as most users have it. onXFS is both, for what a disk decides. onDisks is for contents that
// would take too much memory.
var (
	ramXFS  = regexp.MustCompile("^ram-xfs$")
	diskXFS = regexp.MustCompile("^disk-xfs$")
	onXFS   = regexp.MustCompile("-xfs$")
	onDisks = regexp.MustCompile("^disk-")
)

// cases is everything that is measured, in this order on each pool. To measure something else, add a row.
var cases = []benchCase{
	{
		name: "template", title: "A template of 1 GiB is built, beside the same kernel that powers off at once", pools: nowhere, run: builds,
		goals: []goal{
			{"the first template of a process / VM's floor", term{what: "template build", way: plugin}, term{what: "template build", way: floor}, atMost(1.5), ""},
			{"the same, files not in memory / floor in memory", term{what: "template build, cold", way: plugin}, term{what: "template build", way: floor}, atMost(1.5), ""},
		},
	},
	{
		name: "memory", title: "The plugin's memory after it has built a template", pools: ramXFS, run: memory,
		goals: []goal{
			{"memory at its peak, one template built (MiB)", term{what: "HWM", way: plugin}, term{}, atMost(96), ""},
			{"the same, the kernel unpacked too (MiB)", term{what: "HWM, first build", way: plugin}, term{}, atMost(96), ""},
		},
	},
	{
		name: "life", title: "A volume of 1 GiB is published and unpublished", run: life,
		goals: []goal{
			{"publish / floor", term{what: "publish", way: plugin}, term{what: "publish", way: floor}, atMost(1.25), ""},
			{"unpublish / floor", term{what: "unpublish", way: plugin}, term{what: "unpublish", way: floor}, atMost(1), ""},
			{"mkfs for each volume / publish", term{what: "publish", way: habit}, term{what: "publish", way: plugin}, atLeast(5), ""},
			{"cp --reflink / publish", term{what: "publish", way: otherHabit}, term{what: "publish", way: plugin}, atLeast(5), ""},
		},
	},
	{
		name: "warm", title: "A volume that was kept ready, beside the floor and beside one that was not", run: warmVolumes,
		goals: []goal{
			{"publish of one that is ready / floor", term{what: "publish", way: ready}, term{what: "publish", way: floor}, atMost(0.5), ""},
			{"the same, 99% of them / the floor's median", term{what: "publish", way: ready, q: 0.99}, term{what: "publish", way: floor}, atMost(1), ""},
			{"mkfs for each volume / one that is ready", term{what: "publish", way: habit}, term{what: "publish", way: ready}, atLeast(20), ""},
			{"100 at once, 16 of them ready / none, 99% of them", term{what: "publish, 100 at once", way: ready, q: 0.99},
				term{what: "publish, 100 at once", way: plugin, q: 0.99}, atMost(1.25), ""},
			{"lives one after the other: none kept ready / some", term{what: "lives/s, without rest", way: plugin},
				term{what: "lives/s, without rest", way: ready}, atMost(1.05), ""},
		},
	},
	{
		name: "durable", title: "A claim is created, durably", run: durable,
		goals: []goal{
			{"CreateVolume of one that is ready / a durable clone", term{what: "CreateVolume", way: ready}, term{what: "CreateVolume", way: floor}, atMost(0.5), ""},
			{"claims a second, 32 at once / one by one", term{what: "creates/s, 32 at once", way: ready}, term{what: "creates/s, one by one", way: ready}, atLeast(4), ""},
		},
	},
	{name: "cost", title: "What a volume takes: CPU time, processes, space", run: cost},
	{
		name: "rate", title: "Volumes a second, several at once", run: rate,
		goals: []goal{
			{"lives a second, 8 at once / floor", term{what: "lives/s, 8 at once", way: plugin}, term{what: "lives/s, 8 at once", way: floor}, atLeast(0.8), ""},
			{"lives a second, 32 at once / floor", term{what: "lives/s, 32 at once", way: plugin}, term{what: "lives/s, 32 at once", way: floor}, atLeast(0.8), ""},
			{"published a second, 32 at once / floor", term{what: "published/s, 32 at once", way: plugin}, term{what: "published/s, 32 at once", way: floor}, atLeast(0.8), ""},
		},
	},
	{
		name: "dirty", title: "A volume with 800 MiB that were not written yet is unpublished", run: dirty,
		goals: []goal{
			{"unpublish with 800 MiB dirty / umount and unlink", term{what: "unpublish, 800 MiB dirty", way: plugin}, term{what: "unpublish, 800 MiB dirty", way: floor}, atMost(0.15), ""},
		},
	},
	{
		name: "inside", title: "I/O in a volume, beside the same file without a loop device", run: inside,
		goals: []goal{
			{"4 KiB random reads / without loop", term{what: "4 KiB random read", way: plugin}, term{what: "4 KiB random read", way: floor}, atLeast(0.9), ""},
			{"4 KiB random writes / without loop", term{what: "4 KiB random write", way: plugin}, term{what: "4 KiB random write", way: floor}, atLeast(0.9), ""},
			{"1 MiB sequential reads / without loop", term{what: "1 MiB sequential read", way: plugin}, term{what: "1 MiB sequential read", way: floor}, atLeast(0.9), ""},
			{"1 MiB sequential writes / without loop", term{what: "1 MiB sequential write", way: plugin}, term{what: "1 MiB sequential write", way: floor}, atLeast(0.9), ""},
		},
	},
	{
		name: "volatile", title: "8 KiB are written and synced, again and again", run: syncs,
		goals: []goal{
			{"synced overwrites in a volatile volume / in a synced one", term{what: synced[1].name, way: volatile},
				term{what: synced[1].name, way: plugin}, atLeast(10), "btrfs"},
			{"synced appends in a volatile volume / in a synced one", term{what: synced[0].name, way: volatile},
				term{what: synced[0].name, way: plugin}, atLeast(10), "btrfs"},
		},
	},
	{
		name: "postgres", title: "A database server in a volume", pools: onXFS, run: postgres,
		goals: []goal{
			{"transactions in a volatile volume / in a tmpfs", term{what: "pgbench", way: volatile},
				term{what: "pgbench", way: tmpfs}, atLeast(0.8), ""},
			{"transactions in a volatile volume / in an emptyDir", term{what: "pgbench", way: volatile},
				term{what: "pgbench", way: emptyDir}, atLeast(1), ""},
		},
	},
	{
		name: "files", title: "A checkout and a build: small files, which nobody syncs", pools: diskXFS, run: files,
		goals: []goal{
			{"a checkout in a volatile volume / in a tmpfs", term{what: "checkout of 5000 files", way: volatile},
				term{what: "checkout of 5000 files", way: tmpfs}, atMost(1.25), ""},
			{"a build in a volatile volume / in a tmpfs", term{what: "build of 5000 objects", way: volatile},
				term{what: "build of 5000 objects", way: tmpfs}, atMost(1.25), ""},
		},
	},
	{
		name: "contents", title: "A volume that is born with a content, beside an empty one of the same size",
		pools: onDisks, run: contents,
		goals: contentGoals(),
	},
	{
		name: "goldens", title: "A volume that starts from a golden, beside an empty one of the same size, and a commit",
		pools: onDisks, run: goldens,
		goals: goldenGoals(),
	},
	{
		name: "contents-databases", title: "100 volumes at once that are born with PostgreSQL's data directory",
		pools: onXFS, run: databases,
		goals: []goal{
			{"100 data directories published, ready (ms)", term{what: allDatabases, way: ready}, term{}, atMost(250), ""},
		},
	},
	{
		name: "contents-disk", title: "A disk of 1 TiB, with data in 200 places, is cloned", pools: onDisks, run: wholeDisks,
		goals: []goal{
			{"a disk of 1 TiB published as disk.img (ms)", term{what: diskPublished, way: plugin}, term{}, atMost(100), ""},
			{"a block claim of 1 TiB created (ms)", term{what: blockCreated, way: plugin}, term{}, atMost(100), ""},
		},
	},
	{
		name: "contents-unpack", title: "A content is unpacked in the VM, beside tar in the same VM",
		pools: diskXFS, run: unpacking,
		goals: unpackGoals(),
	},
	{
		name: "crowd", title: "Publish beside volumes that are mounted", pools: ramXFS, run: crowd,
		goals: []goal{
			{"publish beside 1000 / floor there", term{what: "publish", way: plugin, at: most}, term{what: "publish", way: floor, at: most}, atMost(1.25).reaching(crowdSize), ""},
			{"publish beside 1000 / beside few", term{what: "publish", way: plugin, at: most}, term{what: "publish", way: plugin, at: few}, atMost(1.2).reaching(crowdSize), ""},
			{"unpublish beside 1000 / beside few", term{what: "unpublish", way: plugin, at: most}, term{what: "unpublish", way: plugin, at: few}, atMost(1.2).reaching(crowdSize), ""},
		},
	},
	{
		name: "sizes", title: "100 volumes of 100 sizes never seen before, 32 at once", pools: ramXFS, run: sizes,
		goals: []goal{
			{"100 sizes: published", term{what: "done", way: plugin}, term{}, atLeast(100), ""},
			{"100 sizes: all of them (s)", term{what: "all published", way: plugin}, term{}, atMost(15).reaching(100), ""},
			{"a later template / VM's floor", term{what: "one alone", way: plugin}, term{what: "one alone", way: floor}, atMost(1.15), ""},
			{"one size never seen, alone (ms)", term{what: "one alone", way: plugin}, term{}, atMost(1000), "ext4"},
			{"the slowest size, once seen / the commonest", term{what: "publish, seen", way: "slowest"}, term{what: "publish, seen", way: "commonest"}, atMost(1.25), ""},
		},
	},
	{
		name: "claims", title: "Claims beside claims, and a restart with all of them", pools: ramXFS, run: claims,
		goals: []goal{
			{"CreateVolume beside 10,000 / beside few", term{what: "CreateVolume", way: plugin, at: most}, term{what: "CreateVolume", way: plugin, at: few}, atMost(1.2).reaching(claimCount), ""},
			{"GetCapacity beside 10,000 (ms)", term{what: "GetCapacity", way: plugin, at: most}, term{}, atMost(1).reaching(claimCount), ""},
			{"ListVolumes of 10,000 (ms)", term{what: "ListVolumes", way: plugin, at: most}, term{}, atMost(50).reaching(claimCount), ""},
			{"ready after a restart with 10,000 (ms)", term{what: "ready after restart", way: plugin, at: most}, term{}, atMost(2000).reaching(claimCount), ""},
			{"a sweep of 10,000 (ms)", term{what: "sweep", way: plugin, at: most}, term{}, atMost(2000).reaching(claimCount), ""},
			{"RSS with 10,000 (MiB)", term{what: "RSS", way: plugin, at: most}, term{}, atMost(64).reaching(claimCount), ""},
		},
	},
}

// nowhere matches no pool: the case runs before there is one.
var nowhere = regexp.MustCompile("^$")

// unit of what a series measures. With which content it was measured does not matter: see [mixture.with].
func unit(what string) string {
	what, _, _ = strings.Cut(what, ", with ")
	if u, ok := units[what]; ok {
		return u
	}
	return "1/s"
}

// list prints the table.
func list(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer t.Flush()
	for _, c := range cases {
		fmt.Fprintf(t, "%s\t%s\t\n", c.name, c.title)
		for _, g := range c.goals {
			fmt.Fprintf(t, "\t  %s\t%s\n", g.row, g.bound)
		}
	}
}
