// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// The goldens that volumes start from. One is what a job wrote into an empty volume. The other one is what a second job
// made of it, which wrote a tenth of it again. The third one is committed again and again, and nothing starts from it.
const (
	freshGolden     = "fresh"
	rewrittenGolden = "rewritten"
	nextGolden      = "next"
)

// goldenFlags take away the limits of goldens. Of each there is one generation.
var goldenFlags = []string{
	"--goldens", "--golden-cache", "0", "--golden-namespace-cache", "0", "--golden-generations", "1",
}

// What the case about them measures, beside cold and warm. A commit is measured from the answer to unpublish until the
// generation is there.
const (
	unpublishChanged  = "unpublish, a tenth changed"
	commitOfAll       = "commit of all that is in it"
	commitOfNew       = "commit of a tenth, in a new file"
	commitOfRewritten = "commit of a tenth, rewritten"
)

// golden is the name of a series for a golden.
func (m mixture) golden(what string) string { return what + ", with a golden of " + amount(m.bytes) }

// changed is how many bytes of a golden a later job changes.
func (m mixture) changed() int64 { return m.bytes / 10 }

// goldenGoals are those of each golden.
func goldenGoals() (goals []goal) {
	for _, m := range []mixture{largeContent, smallContent} {
		for _, g := range []struct{ row, way string }{
			{"publish from a golden of " + amount(m.bytes), golden},
			{"publish from a golden of " + amount(m.bytes) + ", a tenth rewritten", rewritten},
		} {
			goals = append(goals,
				goal{g.row + " / of an empty volume, on demand", term{what: m.golden(cold), way: g.way},
					term{what: m.golden(cold), way: empty}, atMost(1.25), ""},
				goal{g.row + " / of an empty volume, ready", term{what: m.golden(warm), way: g.way},
					term{what: m.golden(warm), way: empty}, atMost(1.05), ""})
		}
		what := m.golden(unpublishChanged)
		goals = append(goals, goal{"unpublish with a commit of " + amount(m.changed()) + " changed / without a commit",
			term{what: what, way: committing}, term{what: what, way: golden}, atMost(1.5), ""})
	}
	return goals
}

// overGolden is the plugin, asked for volumes that start from a golden and are committed to one; each may be empty.
type overGolden struct {
	overCSI
	from, to string
}

func (w overGolden) prepare(v *volume) error {
	if w.from != "" {
		v.csi.Context["from"] = "golden/" + w.from
	}
	if w.to != "" {
		v.csi.Context["commitTo"] = w.to
	}
	return w.overCSI.prepare(v)
}

// goldens measures volumes that start from goldens, beside empty ones of the same size, and what a commit costs.
func goldens(ctx context.Context, b *bench, d *bed) error {
	return b.eachMixture(ctx, d, "goldens", b.golden)
}

// goldenWays start a volume in the ways that are compared.
var goldenWays = []string{golden, rewritten, empty}

func (b *bench) golden(ctx context.Context, d *bed, at key, m mixture) (err error) {
	k, err := b.newKeeper(ctx, d, goldenFlags...)
	defer func() { err = errors.Join(err, k.close()) }()
	if err != nil {
		return err
	}
	over := overCSI{k.client}
	k.ways = map[string]way{
		empty: over, golden: overGolden{over, freshGolden, ""}, rewritten: overGolden{over, rewrittenGolden, ""},
		committing: overGolden{over, freshGolden, nextGolden},
	}
	if err := b.makeGoldens(ctx, k, at, m); err != nil {
		return err
	}
	if err := b.countExtents(ctx, k, at, m); err != nil {
		return err
	}
	at.What = m.golden(cold)
	if err := b.takeTurns(ctx, k, at, goldenWays, m.volume(), func() error { return nil }); err != nil {
		return err
	}
	if err := b.unpublishChanged(ctx, k, at, m); err != nil {
		return err
	}
	return b.readyGoldens(ctx, k, at, m)
}

// makeGoldens has two jobs make the goldens that volumes start from.
func (b *bench) makeGoldens(ctx context.Context, k keeper, at key, m mixture) error {
	at.Way = committing
	for _, job := range []struct {
		what, from, to string
		work           func(dir string) error
	}{
		{commitOfAll, "", freshGolden, func(dir string) error { return m.fill(dir, 1) }},
		{commitOfRewritten, freshGolden, rewrittenGolden, func(dir string) error { return m.rewrite(dir, 2) }},
	} {
		at.What = m.golden(job.what)
		_, took, err := b.job(ctx, k, overGolden{overCSI{k.client}, job.from, job.to}, k.volume(at.FS, m.volume()), job.work)
		if err != nil {
			return fmt.Errorf("%s: %w", job.what, err)
		}
		b.add(at, took.Seconds())
		b.say("%-10s %-8s %s, %s: it was there after %.1f s", at.Pool, at.Case, at.FS, at.What, took.Seconds())
	}
	return nil
}

// job is the life of a volume in which a job works, which asks for a commit in the end: how long unpublish took, and
// all that came after its answer.
func (b *bench) job(ctx context.Context, k keeper, by overGolden, v *volume, work func(dir string) error) (
	unpublished, after time.Duration, err error) {
	if _, err := k.first(ctx, by, v); err != nil {
		return 0, 0, err
	}
	if err := errors.Join(work(v.target), askForCommit(v.target)); err != nil {
		return 0, 0, err
	}
	had, err := k.generation(by.to)
	if err != nil {
		return 0, 0, err
	}
	if unpublished, err = timed(ctx, v, by.unpublish); err != nil {
		return 0, 0, err
	}
	if after, err = timed(ctx, v, func(ctx context.Context, _ *volume) error { return k.settled(ctx) }); err != nil {
		return 0, 0, err
	}
	has, err := k.generation(by.to)
	if err == nil && by.to != "" && has == had {
		err = fmt.Errorf("the golden %s has no new generation\n%s", by.to, k.Tail())
	}
	if err != nil {
		return 0, 0, err
	}
	// What the pool has to write and to free is nobody's next turn.
	return unpublished, after, errors.Join(by.tidy(v), syncFS(k.root))
}

// askForCommit makes the file in a volume by which a job asks for the commit.
func askForCommit(dir string) error {
	at := filepath.Join(dir, ".disktemplate")
	return errors.Join(os.Mkdir(at, 0o755), os.WriteFile(filepath.Join(at, "commit"), nil, 0o644))
}

// generation is the path of the only generation of a golden, or "" if there is none. A volume that asks for a golden
// which is not there is empty, and no call says so.
func (k keeper) generation(name string) (string, error) {
	found, err := filepath.Glob(filepath.Join(k.node.Pool, "goldens", "bench."+name+".*"))
	if err != nil || len(found) == 0 {
		return "", err
	}
	if len(found) > 1 {
		return "", fmt.Errorf("the golden %s has %d generations", name, len(found))
	}
	return found[0], nil
}

// settled waits until volumes that were unpublished have ended and are committed. It asks seldom: the plugin looks at
// hundreds of files for each page of metrics.
func (k keeper) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, buildPatience)
	defer cancel()
	for {
		sums, err := k.Metrics()
		if err == nil && sums["csi_disktemplate_volumes_ending"]+sums["csi_disktemplate_commits_waiting"] == 0 {
			return nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return fmt.Errorf("volumes do not end: %w\n%s", err, k.Tail())
		}
		time.Sleep(4 * pause)
	}
}

// countExtents counts those of a volume of each way.
func (b *bench) countExtents(ctx context.Context, k keeper, at key, m mixture) error {
	at.What = m.golden("extents")
	for _, at.Way = range goldenWays {
		v, by := k.volume(at.FS, m.volume()), k.ways[at.Way]
		if _, err := k.first(ctx, by, v); err != nil {
			return err
		}
		n, err := k.extents()
		if err != nil {
			return err
		}
		b.add(at, n)
		if err := errors.Join(by.unpublish(ctx, v), by.tidy(v), k.settled(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// unpublishChanged measures what kubelet waits for when a job is done that wrote a tenth of its golden's size: with a
// commit, and without one. After the answer one is written and committed, and the other one is dropped. Nobody's turn
// begins before that has ended.
func (b *bench) unpublishChanged(ctx context.Context, k keeper, at key, m mixture) error {
	work := func(dir string) error { return fill(filepath.Join(dir, "new"), int(m.changed()>>20)) }
	for range b.rounds(20, 4, 40*time.Second) {
		for _, at.Way = range b.shuffled([]string{golden, committing}) {
			v := k.volume(at.FS, m.volume())
			unpublished, after, err := b.job(ctx, k, k.ways[at.Way].(overGolden), v, work)
			if err != nil {
				return fmt.Errorf("%s: %w", at.Way, err)
			}
			at.What = m.golden(unpublishChanged)
			b.add(at, milliseconds(unpublished))
			if at.Way == committing {
				at.What = m.golden(commitOfNew)
				b.add(at, after.Seconds())
			}
		}
	}
	return nil
}

// readyGoldens measures the same as on demand, of volumes that are ready.
func (b *bench) readyGoldens(ctx context.Context, k keeper, at key, m mixture) error {
	const each = 4
	flags := append([]string{"--warm", fmt.Sprint(each), "--warm-max", fmt.Sprint(each * len(goldenWays))}, goldenFlags...)
	if err := k.restart(ctx, b.o.binary, append(flags, harness.AnyPort...)...); err != nil {
		return err
	}
	for _, name := range goldenWays { // so that they are kept ready
		if _, _, err := b.live(ctx, k.ways[name], k.volume(at.FS, m.volume())); err != nil {
			return err
		}
	}
	at.What = m.golden(warm)
	return b.takeTurns(ctx, k, at, goldenWays, m.volume(), func() error { return k.full(ctx) })
}
