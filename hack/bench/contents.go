// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// The contents of which volumes are born full. A template of 10 GiB takes minutes to build without KVM. So there is one
// only, of ext4 on the pool that is quoted, and none in a quick run. Elsewhere the small content says the same.
var (
	largeContent = mixture{10 << 30, 20_000}
	smallContent = mixture{256 << 20, 500}
)

// largePool is the size of the pool for the large content, and largeNeeds is what the disk needs for it: the archive,
// its copy in the pool while the template is built, and the template. A golden needs as much: the volume, what it is
// packed into, and the same once more for the one of which a part was written again.
const (
	largePool  = 48 << 30
	largeNeeds = 34 << 30
)

// name is how rows name a content.
func (m mixture) name() string { return amount(m.bytes) + " of content" }

// amount writes so many bytes.
func amount(bytes int64) string {
	if bytes < 1<<30 {
		return fmt.Sprintf("%d MiB", bytes>>20)
	}
	return fmt.Sprintf("%d GiB", bytes>>30)
}

// volume is the size of a volume that has room for the content.
func (m mixture) volume() int64 { return m.bytes + m.bytes/2 + 1<<30 }

// cold and warm are what the cases about contents measure: volumes that are made on demand, and those that are ready.
const (
	cold = "publish"
	warm = "publish of one that is ready"
)

// with is the name of a series for a content.
func (m mixture) with(what string) string { return what + ", with " + m.name() }

// contentGoals are those of each content.
func contentGoals() (goals []goal) {
	for _, m := range []mixture{largeContent, smallContent} {
		goals = append(goals,
			goal{"publish with " + m.name() + " / of an empty volume, on demand", term{what: m.with(cold), way: full},
				term{what: m.with(cold), way: empty}, atMost(1.25), ""},
			goal{"publish with " + m.name() + " / of an empty volume, ready", term{what: m.with(warm), way: full},
				term{what: m.with(warm), way: empty}, atMost(1.05), ""})
	}
	return goals
}

// contents measures volumes that are born with a content, beside empty ones of the same size.
func contents(ctx context.Context, b *bench, d *bed) error {
	return b.eachMixture(ctx, d, "contents", b.fullAndEmpty)
}

// eachMixture calls measure for each filesystem with the content that it gets on a pool, if it gets one.
func (b *bench) eachMixture(ctx context.Context, d *bed, name string,
	measure func(context.Context, *bed, key, mixture) error) error {
	for _, fs := range filesystems {
		k := key{Case: name, Pool: d.kind.name, FS: fs}
		var err error
		switch {
		case fs == "ext4" && d.kind.name == quotedPool && !b.o.quick && b.hasRoom(k):
			err = b.onLargePool(ctx, d, func(large *bed) error { return measure(ctx, large, k, largeContent) })
		case fs == "ext4" || d.kind.name == quotedPool:
			err = measure(ctx, d, k, smallContent)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", fs, err)
		}
	}
	return nil
}

// hasRoom reports whether the disk has room for the large content.
func (b *bench) hasRoom(k key) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(b.dir, &st); err == nil && int64(st.Bavail)*st.Bsize >= largeNeeds {
		return true
	}
	b.say("%-10s %-8s %s is left out: %s has no room for %d GiB", k.Pool, k.Case, largeContent.name(), b.o.dir,
		largeNeeds>>30)
	return false
}

// onLargePool has the large content measured on a pool of its own.
func (b *bench) onLargePool(ctx context.Context, d *bed, measure func(*bed) error) (err error) {
	large, err := b.newBed(ctx, poolKind{name: d.kind.name + "-large", fs: d.kind.fs, sparse: largePool})
	defer func() { err = errors.Join(err, large.close()) }()
	if err != nil {
		return err
	}
	return measure(large)
}

// fullAndEmpty has the two take turns: on demand, and then from what is ready.
func (b *bench) fullAndEmpty(ctx context.Context, d *bed, k key, m mixture) (err error) {
	w, err := b.newWithContents(ctx, d, "tar", func(path string) error { return m.write(path, 1) })
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	w.ways = map[string]way{full: overContent{overCSI{w.client}}, empty: overCSI{w.client}}
	if err := b.firstFull(ctx, w, k, m); err != nil {
		return err
	}
	k.What = m.with(cold)
	both := []string{full, empty}
	if err := b.takeTurns(ctx, w.keeper, k, both, m.volume(), func() error { return nil }); err != nil {
		return err
	}
	if err := w.again(ctx, b, "--warm", "4", "--warm-max", "8"); err != nil {
		return err
	}
	for _, name := range both { // so that they are kept ready
		if _, _, err := b.live(ctx, w.ways[name], w.volume(k.FS, m.volume())); err != nil {
			return err
		}
	}
	k.What = m.with(warm)
	return b.takeTurns(ctx, w.keeper, k, both, m.volume(), func() error { return w.full(ctx) })
}

// firstFull has the two templates built, and counts their extents.
func (b *bench) firstFull(ctx context.Context, w withContents, k key, m mixture) error {
	for _, k.Way = range []string{empty, full} {
		v := w.volume(k.FS, m.volume())
		by := w.ways[k.Way]
		took, err := w.first(ctx, by, v)
		if err != nil {
			return err
		}
		k.What = m.with("first of its kind")
		b.add(k, took.Seconds())
		n, err := w.extents()
		if err != nil {
			return err
		}
		k.What = m.with("extents")
		b.add(k, n)
		if err := errors.Join(by.unpublish(ctx, v), by.tidy(v)); err != nil {
			return err
		}
		b.say("%-10s %-8s %s, %s: its template was there after %.1f s", k.Pool, k.Case, k.FS, k.Way, took.Seconds())
	}
	return nil
}

// takeTurns publishes and unpublishes volumes by several ways. The rest is longer than elsewhere: the kernel frees the
// extents of a full volume after the answer.
func (b *bench) takeTurns(ctx context.Context, w keeper, k key, names []string, size int64,
	prepared func() error) error {
	for range b.rounds(60, 15, 5*time.Second) {
		for _, k.Way = range b.shuffled(names) {
			if err := prepared(); err != nil {
				return err
			}
			published, _, err := b.live(ctx, w.ways[k.Way], w.volume(k.FS, size))
			if err != nil {
				return fmt.Errorf("%s: %w", k.Way, err)
			}
			b.add(k, milliseconds(published))
			time.Sleep(4 * pause)
		}
	}
	return nil
}
