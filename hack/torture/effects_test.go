// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// operation is one call, and what is around it. Each function may be nil.
type operation struct {
	name string
	// prepare brings the node to where the call is made.
	prepare func(n *node) error
	// call is the call, which may be made again.
	call func(n *node) error
	// check holds the node against what the call has answered.
	check func(n *node) error
	// giveUp takes away what a call that was not answered may have done, and what was
	// prepared; end, what a call that was.
	giveUp, end func(n *node) error
	// forget has kubelet give up without a word; the sweep of the next start has to do it.
	forget func(n *node)
	// undoes tells that a call that fails leaves the node as it was.
	undoes bool
}

const word, later = "written before", "written after"

// operations are all that a container orchestrator asks for, and some in several forms.
func operations() []operation {
	var ops []operation
	for _, d := range []*disk{
		inline("inline-ext4", "ext4", "filesystem"), inline("inline-xfs", "xfs", "filesystem"),
		inline("inline-btrfs", "btrfs", "filesystem"), inline("inline-image", "ext4", "diskImage"),
	} {
		gone := func(n *node) error { return n.unpublish(d) }
		ops = append(ops, operation{
			name: "publish " + d.id, undoes: true,
			call: func(n *node) error { return n.publish(d) },
			check: func(n *node) error {
				return all(func() error { return n.write(d, word) }, func() error { return n.holds(d, word) })
			},
			giveUp: gone, end: gone, forget: func(n *node) { n.forget(d) },
		}, operation{
			name:    "unpublish " + d.id,
			prepare: func(n *node) error { return n.use(d, word) },
			call:    gone, giveUp: gone, forget: func(n *node) { n.forget(d) },
		})
	}
	thick := claim("claim-thick", "ext4", "filesystem")
	thick.thick = true
	for _, d := range []*disk{
		claim("claim-ext4", "ext4", "filesystem"), claim("claim-xfs", "xfs", "filesystem"), claim("claim-block", "ext4", "block"),
		claim("claim-image", "ext4", "diskImage"), thick,
	} {
		ops = append(ops, claimOperations(d)...)
	}
	for _, d := range []*disk{claim("source-ext4", "ext4", "filesystem"), claim("source-xfs", "xfs", "filesystem"), claim("source-block", "ext4", "block")} {
		ops = append(ops, copyOperations(d)...)
	}
	return append(ops, growOperations()...)
}

func claimOperations(d *disk) []operation {
	create := func(n *node) error { return n.create(d) }
	remove := func(n *node) error { return n.delete(d) }
	staged := func(n *node) error {
		return all(func() error { return n.create(d) }, func() error { return n.stage(d) })
	}
	used := func(n *node) error { return n.use(d, word) }
	away := func(n *node) error { return n.unuse(d) }
	unstaged := func(n *node) error {
		return all(func() error { return n.unstage(d) }, func() error { return n.delete(d) })
	}
	// What was written is there, wherever it is published next.
	kept := func(n *node) error {
		return all(func() error { return n.stage(d) }, func() error { return n.publish(d) }, func() error { return n.holds(d, word) })
	}
	return []operation{
		{name: "create " + d.id, undoes: true, call: create, giveUp: remove,
			check: func(n *node) error {
				return all(func() error { return n.stage(d) }, func() error { return n.publish(d) }, func() error { return n.write(d, word) })
			}, end: away},
		{name: "stage " + d.id, prepare: create, call: func(n *node) error { return n.stage(d) }, giveUp: unstaged,
			check: func(n *node) error {
				return all(func() error { return n.publish(d) }, func() error { return n.write(d, word) })
			}, end: away},
		{name: "publish " + d.id, prepare: staged, call: func(n *node) error { return n.publish(d) }, giveUp: away,
			check: func(n *node) error { return n.write(d, word) }, end: away},
		{name: "unpublish " + d.id, prepare: used, call: func(n *node) error { return n.unpublish(d) }, giveUp: away, check: kept, end: away},
		{name: "unstage " + d.id, prepare: func(n *node) error {
			return all(func() error { return n.use(d, word) }, func() error { return n.unpublish(d) })
		},
			call: func(n *node) error { return n.unstage(d) }, giveUp: away, check: kept, end: away},
		{name: "delete " + d.id, prepare: create, call: remove, giveUp: remove},
	}
}

// copyOperations are of snapshots and copies of a volume that is in use: it must go on
// whatever happens to them.
func copyOperations(d *disk) []operation {
	const snap = "snap"
	restored, cloned := copyOf(d.id+"-restored", d, snap), copyOf(d.id+"-cloned", d, "")
	thick := copyOf(d.id+"-thick", d, "")
	thick.thick = true
	used := func(n *node) error { return n.use(d, word) }
	away := func(n *node) error { return n.unuse(d) }
	// A volume that is frozen would not let this happen.
	alive := func(n *node) error {
		return all(func() error { return n.holds(d, word) }, func() error { return n.write(d, word) })
	}
	snapped := func(n *node) error {
		return all(func() error { return n.use(d, word) }, func() error { return n.snapshot(snap, d) }, func() error { return n.write(d, later) })
	}
	drop := func(n *node) error { return n.deleteSnapshot(snap) }
	// The copy holds the word, and goes.
	held := func(n *node, c *disk) error {
		return all(func() error { return n.stage(c) }, func() error { return n.publish(c) }, func() error { return n.holds(c, word) },
			func() error { return n.unpublish(c) }, func() error { return n.unstage(c) })
	}
	ops := []operation{
		{name: "snapshot " + d.id, undoes: true, prepare: used, call: func(n *node) error { return n.snapshot(snap, d) },
			check: func(n *node) error {
				return all(func() error { return alive(n) }, func() error { return n.create(restored) }, func() error { return held(n, restored) }, func() error { return n.delete(restored) })
			},
			giveUp: func(n *node) error {
				return all(func() error { return alive(n) }, func() error { return drop(n) }, func() error { return away(n) })
			},
			end: func(n *node) error { return all(func() error { return drop(n) }, func() error { return away(n) }) }},
		{name: "delete snapshot of " + d.id, prepare: snapped, call: drop,
			giveUp: func(n *node) error { return all(func() error { return drop(n) }, func() error { return away(n) }) }, end: away},
		{name: "restore " + d.id, undoes: true, prepare: snapped, call: func(n *node) error { return n.create(restored) },
			check: func(n *node) error { return held(n, restored) },
			giveUp: func(n *node) error {
				return all(func() error { return n.delete(restored) }, func() error { return drop(n) }, func() error { return away(n) })
			},
			end: func(n *node) error {
				return all(func() error { return n.delete(restored) }, func() error { return drop(n) }, func() error { return away(n) })
			}},
	}
	for _, c := range []*disk{cloned, thick} {
		end := func(n *node) error {
			return all(func() error { return n.delete(c) }, func() error { return alive(n) }, func() error { return away(n) })
		}
		ops = append(ops, operation{
			name: "clone " + c.id, undoes: true, prepare: used, call: func(n *node) error { return n.create(c) },
			check: func(n *node) error { return held(n, c) }, giveUp: end, end: end,
		})
	}
	return ops
}

func growOperations() []operation {
	ext4, xfs, block := claim("grow-ext4", "ext4", "filesystem"), claim("grow-xfs", "xfs", "filesystem"), claim("grow-block", "ext4", "block")
	var ops []operation
	for _, d := range []*disk{ext4, xfs, block} {
		larger := 2 * d.bytes
		kept := func(n *node) error { return n.holds(d, word) }
		away := func(n *node) error { return all(func() error { return kept(n) }, func() error { return n.unuse(d) }) }
		ops = append(ops, operation{
			name: "expand " + d.id, prepare: func(n *node) error { return n.use(d, word) },
			call: func(n *node) error { return n.expand(d, larger) }, check: kept, giveUp: away, end: away,
		})
		if d == ext4 { // without CAP_SYS_RESOURCE it grows when it is staged
			ops = append(ops, operation{
				name: "stage a larger " + d.id,
				prepare: func(n *node) error {
					return all(func() error { return n.use(d, word) }, func() error { return n.unpublish(d) }, func() error { return n.unstage(d) }, func() error { return n.expand(d, larger) })
				},
				call:  func(n *node) error { return n.stage(d) },
				check: func(n *node) error { return all(func() error { return n.publish(d) }, func() error { return kept(n) }) },
				giveUp: func(n *node) error {
					return all(func() error { return n.unstage(d) }, func() error { return n.delete(d) })
				},
				end: func(n *node) error { return n.unuse(d) },
			})
			continue
		}
		ops = append(ops, operation{
			name: "expand in use " + d.id,
			prepare: func(n *node) error {
				return all(func() error { return n.use(d, word) }, func() error { return n.expand(d, larger) })
			},
			call: func(n *node) error { return n.expandOnNode(d, larger) }, check: kept, giveUp: away, end: away,
		})
	}
	return ops
}

// way is what happens after the plugin was killed, or has failed, in a call.
type way string

const (
	retries way = "retries" // the call is made again until it succeeds
	givesUp way = "gives up"
	forgets way = "forgets"
)

// ways are those of an operation: all of them, where somebody has asked for torture, and
// else one, another for each operation.
func (o operation) ways(i int) []way {
	ways := []way{retries, givesUp}
	if o.forget != nil {
		ways = append(ways, forgets)
	}
	if thorough {
		return ways
	}
	return ways[i%len(ways):][:1]
}

// thorough is for who has the time: make torture sets it.
var thorough = os.Getenv("COUNT") != ""

// do runs a function that may be nil.
func do(f func(n *node) error, n *node) error {
	if f == nil {
		return nil
	}
	return f(n)
}

// onPools runs a test on a pool of each kind, with all templates built, and, if that is
// wanted, with the race detector.
func onPools(t *testing.T, race bool, test func(n *node)) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind.Mount(t, 6<<30))
			n.race = race
			n.start()
			n.warm()
			test(n)
		})
	}
}

// warm has every template built.
func (n *node) warm() {
	n.t.Helper()
	for fs := range sizes {
		d := inline("warm-"+fs, fs, "filesystem")
		n.must("building a template", n.publish(d))
		n.must("unpublishing", n.unpublish(d))
		n.must("the end of its pod", os.RemoveAll(n.podDir(d)))
	}
	n.mustHave("after building the templates", "")
}

// TestKillAtEveryEffect kills the plugin before each effect of each operation in turn,
// and after the last. Then kubelet goes on in every way it has: nothing that was
// answered is lost, and at the end nothing is left.
func TestKillAtEveryEffect(t *testing.T) {
	onPools(t, false, func(n *node) {
		kills := 0
		for i, op := range operations() {
			for _, w := range op.ways(i) {
				kills += n.killAtEach(op, w)
			}
		}
		if n.t.Logf("killed %d times", kills); kills < 200 {
			n.t.Error("operations have lost their effects")
		}
	})
}

func (n *node) killAtEach(op operation, w way) (kills int) {
	n.t.Helper()
	for at := 1; ; at++ {
		n.must(op.name+": prepare", do(op.prepare, n))
		n.arm(at, "kill")
		err := op.call(n)
		effects := n.trace()
		if !n.killed(err) {
			n.disarm()
			n.must(op.name, err)
			n.must(op.name+": check", do(op.check, n))
			n.must(op.name+": end", do(op.end, n))
			n.mustHave(op.name+", not killed", "")
			n.t.Logf("%s, kubelet %s: killed before each of %v", op.name, w, effects)
			return at - 1
		}
		n.disarm() // the next process would count again
		when := fmt.Sprintf("%s, killed before effect %d, %s, kubelet %s", op.name, at, effects[len(effects)-1], w)
		if w == forgets {
			op.forget(n)
		}
		n.start()
		n.goOn(op, w, when)
	}
}

// goOn is what kubelet does after a call that failed.
func (n *node) goOn(op operation, w way, when string) {
	n.t.Helper()
	switch w {
	case retries:
		n.must(when+": again", op.call(n))
		n.must(when+": check", do(op.check, n))
		n.must(when+": end", do(op.end, n))
	case givesUp:
		n.must(when+": give up", do(op.giveUp, n))
	}
	n.mustHave(when, "")
}

// TestErrorAtEveryEffect makes each effect of each operation fail, with each of the
// errors in turn. A call that fails says so, and leaves the node as it was, or so that
// the next one goes on.
func TestErrorAtEveryEffect(t *testing.T) {
	onPools(t, false, func(n *node) {
		failures := 0
		for i, op := range operations() {
			op.forget = nil // the plugin lives
			for j, w := range op.ways(i) {
				failures += n.failAtEach(op, w, i+j)
			}
		}
		if n.t.Logf("failed %d times", failures); failures < 200 {
			n.t.Error("operations have lost their effects")
		}
	})
}

var errnos = []string{"ENOSPC", "EIO", "EBUSY", "EINTR", "ENOMEM"}

func (n *node) failAtEach(op operation, w way, offset int) (failures int) {
	n.t.Helper()
	for at := 1; ; at++ {
		errno := errnos[(offset+at)%len(errnos)]
		n.must(op.name+": prepare", do(op.prepare, n))
		before := n.volumes()
		n.arm(at, errno)
		err := op.call(n)
		effects := n.trace()
		n.disarm()
		if len(effects) < at {
			n.must(op.name, err)
			n.must(op.name+": check", do(op.check, n))
			n.must(op.name+": end", do(op.end, n))
			n.mustHave(op.name+", without an error", "")
			return at - 1
		}
		when := fmt.Sprintf("%s, %s at effect %d, %s, which gave %v; kubelet %s", op.name, errno, at, effects[at-1], err, w)
		if err == nil { // it was made up for
			n.must(when+": check", do(op.check, n))
			n.must(when+": end", do(op.end, n))
			n.mustHave(when, "")
			continue
		}
		if op.undoes {
			n.mustHave(when, before)
		}
		n.goOn(op, w, when)
	}
}

// TestKillInBuild kills the plugin before each effect of building a template.
func TestKillInBuild(t *testing.T) {
	onPools(t, false, func(n *node) {
		t := n.t
		templates := func() []string {
			entries, err := os.ReadDir(filepath.Join(n.pool, "templates"))
			n.must("templates", err)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			return names
		}
		for at := 1; ; at++ {
			d := inline("build", "ext4", "filesystem")
			d.label = fmt.Sprint("build", at) // no template has that yet
			before := templates()
			n.arm(at, "kill")
			err := n.publish(d)
			effects := n.trace()
			if !n.killed(err) {
				t.Fatalf("publishing ended with %v after %v", err, effects)
			}
			// It is whole, or not there.
			built := len(templates()) - len(before)
			n.disarm()
			n.start()
			n.mustHave("killed in a build", "")
			n.must("publishing again", all(func() error { return n.publish(d) }, func() error { return n.write(d, word) }))
			n.must("unpublishing", n.unpublish(d))
			n.mustHave("killed in a build", "")
			if got := len(templates()) - len(before); got != 1 {
				t.Fatalf("killed before %v: %d templates, and then %d more", effects, built, got)
			}
			if slices.Contains(effects, "FICLONE") { // its volume is made of it
				t.Logf("killed before each of %v", effects)
				if built != 1 {
					t.Errorf("the template was not there when its volume was made")
				}
				return
			}
		}
	})
}

// leaveReplacement leaves what a process does that dies while it grows a volume's copy.
func (n *node) leaveReplacement(d *disk) {
	n.t.Helper()
	volumes := filepath.Join(n.pool, "volumes")
	record := make([]byte, 4096)
	size, err := syscall.Getxattr(filepath.Join(volumes, d.id), string(pool.VolumeAttr), record)
	n.must("its record", err)
	left := filepath.Join(volumes, "."+d.id+".new")
	n.must("replacement", os.WriteFile(left, nil, 0o600))
	n.must("replacement", syscall.Setxattr(left, string(pool.VolumeAttr), record[:size], 0))
}

// TestKillInSweep kills the plugin before each effect of the sweep at its start.
func TestKillInSweep(t *testing.T) {
	onPools(t, false, func(n *node) {
		t := n.t
		fs, image, block := inline("swept", "ext4", "filesystem"), inline("swept-image", "ext4", "diskImage"), claim("swept-block", "ext4", "block")
		frozen := claim("frozen", "xfs", "filesystem")
		for at := 1; ; {
			for _, d := range []*disk{fs, image, block, frozen} {
				n.must("use", n.use(d, word))
			}
			n.kill()
			for _, d := range []*disk{fs, image, block} {
				n.forget(d)
			}
			n.leaveReplacement(frozen)
			n.must("mark", syscall.Setxattr(filepath.Join(n.pool, "volumes", frozen.id), string(pool.FrozenAttr), []byte(`"2026-01-02T03:04:05Z"`), 0))
			testenv.Run(t, "fsfreeze", "--freeze", n.target(frozen))
			n.arm(at, "kill")
			n.launch()
			served := n.serves()
			effects := n.trace()
			n.disarm()
			if !served {
				n.kill()
				n.start()
			}
			n.must("what was frozen", all(func() error { return n.holds(frozen, word) }, func() error { return n.write(frozen, later) }))
			n.must("what was frozen", n.unuse(frozen))
			n.must("the block volume, unstaged by the sweep", n.delete(block))
			n.mustHave(fmt.Sprintf("killed before %v", effects), "")
			if served {
				t.Logf("killed before each of %v", effects)
				if at < 5 {
					t.Errorf("the sweep has only %d effects", at-1)
				}
				return
			}
			at++
		}
	})
}
