// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// way is how kubelet goes on after a call in which the plugin was killed or failed.
type way string

const (
	retries way = "retries"  // it makes the call again
	givesUp way = "gives up" // it takes everything away
	forgets way = "forgets"  // it forgets the pod and makes no call
)

// ways returns the ways to try after the i-th operation: all that it has, if somebody asked for torture, and otherwise
// one of them, not the same for each operation.
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

// TestKillAtEveryEffect kills the plugin before each effect of each operation in turn. Then kubelet goes on in every way
// it has: nothing that was answered is lost, and at the end nothing is left.
func TestKillAtEveryEffect(t *testing.T) {
	onPools(t, false, func(n *node) {
		kills := 0
		for i, op := range operations() {
			for _, w := range op.ways(i) {
				kills += n.killAtEach(op, w)
			}
		}
		if n.t.Logf("killed %d times", kills); kills < 150 {
			n.t.Error("operations have lost their effects")
		}
	})
}

func (n *node) killAtEach(op operation, w way) (kills int) {
	n.t.Helper()
	for at := op.first(n); ; at += op.stride() {
		n.must(op.name+": prepare", n.run(op.prepare...))
		n.arm(at, "kill")
		err := op.call.do(n)
		effects := n.trace()
		if !n.killed(err) {
			n.disarm()
			n.must(op.name, err)
			n.must(op.name+": check", n.run(op.check...))
			n.must(op.name+": end", n.run(op.end...))
			n.mustHave(op.name+", not killed", "")
			n.t.Logf("%s, kubelet %s: killed %d times, before %s", op.name, w, kills, op.those(effects))
			return kills
		}
		kills++
		n.disarm() // the next process would count again
		when := fmt.Sprintf("%s, killed before effect %d, %s, kubelet %s", op.name, at, effects[len(effects)-1], w)
		if w == forgets {
			n.forget(op.forget)
		}
		n.start()
		n.goOn(op, w, when)
	}
}

// goOn does what kubelet does after a call that failed, and checks that nothing is left.
func (n *node) goOn(op operation, w way, when string) {
	n.t.Helper()
	switch w {
	case retries:
		n.must(when+": again", n.run(op.call))
		n.must(when+": check", n.run(op.check...))
		n.must(when+": end", n.run(op.end...))
	case givesUp:
		n.must(when+": give up", n.run(op.giveUp...))
	}
	n.mustHave(when, "")
}

// TestErrorAtEveryEffect makes each effect of each operation fail, with each of the errors in turn. A call that fails
// says so. It leaves the node as it was, or so that the next call goes on from there.
func TestErrorAtEveryEffect(t *testing.T) {
	onPools(t, false, func(n *node) {
		failures := 0
		for i, op := range operations() {
			op.forget = nil // the plugin lives
			for j, w := range op.ways(i) {
				failures += n.failAtEach(op, w, i+j)
			}
		}
		if n.t.Logf("failed %d times", failures); failures < 150 {
			n.t.Error("operations have lost their effects")
		}
	})
}

var errnos = []string{"ENOSPC", "EIO", "EBUSY", "EINTR", "ENOMEM"}

func (n *node) failAtEach(op operation, w way, offset int) (failures int) {
	n.t.Helper()
	for at := op.first(n); ; at += op.stride() {
		errno := errnos[(offset+at)%len(errnos)]
		n.must(op.name+": prepare", n.run(op.prepare...))
		before := n.volumes()
		n.arm(at, errno)
		err := op.call.do(n)
		effects := n.trace()
		n.disarm()
		if len(effects) < at {
			n.must(op.name, err)
			n.must(op.name+": check", n.run(op.check...))
			n.must(op.name+": end", n.run(op.end...))
			n.mustHave(op.name+", without an error", "")
			return failures
		}
		failures++
		when := fmt.Sprintf("%s, %s at effect %d, %s, which gave %v; kubelet %s", op.name, errno, at, effects[at-1], err, w)
		if err == nil { // the plugin did without
			n.must(when+": check", n.run(op.check...))
			n.must(when+": end", n.run(op.end...))
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
	onNewPools(t, false, func(n *node) {
		t := n.t
		build := operation{}
		for at := build.first(n); ; at += build.stride() {
			d := inline("build", "ext4", "filesystem")
			d.label = fmt.Sprint("build", at) // no template has it yet
			before := n.templates()
			n.arm(at, "kill")
			err := n.publish(d)
			effects := n.trace()
			if !n.killed(err) {
				t.Fatalf("publishing ended with %v after %s", err, strings.Join(effects, ", "))
			}
			// The template is whole, or it is not there.
			built := len(n.templates()) - len(before)
			n.disarm()
			n.start()
			n.mustHave("killed in a build", "")
			n.must("publishing again", n.run(publish(d), write(d, word)))
			n.must("unpublishing", n.unpublish(d))
			n.mustHave("killed in a build", "")
			if got := len(n.templates()) - len(before); got != 1 {
				t.Fatalf("killed after %s: %d templates, and then %d more", strings.Join(effects, ", "), built, got)
			}
			if slices.Contains(effects, "FICLONE") { // the volume is cloned from the template
				t.Logf("killed before %s", build.those(effects))
				if built != 1 {
					t.Error("the template was not there when the volume was made")
				}
				return
			}
		}
	})
}

// leaveReplacement leaves the file that a plugin leaves if it dies while it grows a volume's copy.
func (n *node) leaveReplacement(d *disk) {
	n.t.Helper()
	volumes := filepath.Join(n.Pool, "volumes")
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
				n.must("use", n.run(use(d, word)...))
			}
			n.kill()
			for _, d := range []*disk{fs, image, block} {
				n.forget(d)
			}
			n.leaveReplacement(frozen)
			n.must("mark", syscall.Setxattr(filepath.Join(n.Pool, "volumes", frozen.id), string(pool.FrozenAttr), []byte(`"2026-01-02T03:04:05Z"`), 0))
			testenv.Run(t, "fsfreeze", "--freeze", n.volume(frozen).Target)
			n.arm(at, "kill")
			n.launch()
			served := n.serves() == nil
			effects := n.trace()
			n.disarm()
			if !served {
				n.kill()
				n.start()
			}
			n.must("the frozen volume", n.run(holds(frozen, word), write(frozen, later)))
			n.must("the frozen volume", n.run(unuse(frozen)...))
			n.must("the block volume, which the sweep unstaged", n.delete(block))
			n.mustHave("killed after "+strings.Join(effects, ", "), "")
			if served {
				t.Logf("killed before each of %s", strings.Join(effects, ", "))
				if at < 5 {
					t.Errorf("the sweep has only %d effects", at-1)
				}
				return
			}
			at++
		}
	})
}
