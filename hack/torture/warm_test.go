// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// warmOperations are those that take a volume that was kept ready.
func warmOperations() (all []operation) {
	for _, d := range []*disk{
		inline("inline-ext4", "ext4", "filesystem"), inline("inline-xfs", "xfs", "filesystem"),
		inline("inline-btrfs", "btrfs", "filesystem"), inline("inline-image", "ext4", "diskImage"), volatile("volatile-ext4", "ext4"),
		claim("claim-ext4", "ext4", "filesystem"),
	} {
		operations := inlineOperations(d)
		if !d.inline {
			operations = claimOperations(d)
		}
		all = append(all, operations[0]) // publish or create
	}
	return all
}

// TestKillWarm kills the plugin before each effect of taking a volume that is ready, and then before
// each effect of making the next one ready.
func TestKillWarm(t *testing.T) {
	onPools(t, false, func(n *node) {
		kills := 0
		for i, op := range warmOperations() {
			for _, w := range op.ways(i) {
				kills += n.killWarm(op, w)
			}
		}
		if n.t.Logf("killed %d times", kills); kills < 50 {
			n.t.Error("operations have lost their effects")
		}
	}, onXFS.keepingReady(), onBtrfs.keepingReady())
}

func (n *node) killWarm(op operation, w way) (kills int) {
	n.t.Helper()
	for at := 1; ; at++ {
		n.makeReady(op)
		n.arm(at, "kill")
		err := op.call.do(n)
		if err == nil {
			n.waitFor("the next volume to be ready", func() bool { return !n.Alive() || n.AllReady() })
		}
		effects := n.trace()
		n.disarm()
		if !n.killed(err) && n.Alive() {
			n.must(op.name, err)
			if slices.Index(effects, "FICLONE") < slices.Index(effects, "linkat") { // the clone is the next one's
				n.t.Fatalf("%s did not take what was ready: %s", op.name, strings.Join(effects, ", "))
			}
			n.must(op.name+": check", n.run(op.check...))
			n.must(op.name+": end", n.run(op.end...))
			n.mustHave(op.name+", not killed", "")
			n.t.Logf("%s that was ready, kubelet %s: killed before each of %s", op.name, w, strings.Join(effects, ", "))
			return at - 1
		}
		n.mustBeKilled()
		when := fmt.Sprintf("%s that was ready, killed before effect %d, %s, kubelet %s", op.name, at, effects[len(effects)-1], w)
		answered := err == nil
		if w == forgets {
			n.forget(op.forget)
		}
		n.start()
		if answered && w == retries {
			n.must(when+": check", n.run(op.check...)) // what was answered is there
		}
		n.goOn(op, w, when)
	}
}

// TestErrorWarm makes each effect of taking a volume that is ready fail. The call says so and leaves nothing, and the next
// one succeeds.
func TestErrorWarm(t *testing.T) {
	onPools(t, false, func(n *node) {
		failures := 0
		for i, op := range warmOperations() {
			op.forget = nil // the plugin lives
			for j, w := range op.ways(i) {
				failures += n.failWarm(op, w, i+j)
			}
		}
		if n.t.Logf("failed %d times", failures); failures < 20 {
			n.t.Error("operations have lost their effects")
		}
	}, onXFS.keepingReady(), onBtrfs.keepingReady())
}

func (n *node) failWarm(op operation, w way, offset int) (failures int) {
	n.t.Helper()
	errnos := slices.DeleteFunc(slices.Clone(errnos), func(e string) bool { return e == "EINTR" }) // such a call is made again
	for at := 1; ; at++ {
		errno := errnos[(offset+at)%len(errnos)]
		n.makeReady(op)
		before := n.volumes()
		n.arm(at, errno)
		err := op.call.do(n)
		effects := n.trace()
		n.disarm()
		if err == nil {
			n.must(op.name+": check", n.run(op.check...))
			n.must(op.name+": end", n.run(op.end...))
			n.mustHave(op.name+", without an error", "")
			return at - 1
		}
		when := fmt.Sprintf("%s that was ready, %s at effect %d, %s, which gave %v; kubelet %s", op.name, errno, at, effects[at-1], err, w)
		n.mustHave(when, before)
		n.goOn(op, w, when)
	}
}

// makeReady has one volume of an operation's kind be ready. The first that is asked for is not.
func (n *node) makeReady(op operation) {
	n.t.Helper()
	n.must(op.name+": the first", n.run(op.call))
	n.must(op.name+": the end of the first", n.run(op.end...))
	n.waitFor("a volume to be ready", n.AllReady)
	n.must(op.name+": prepare", n.run(op.prepare...))
}

// waitFor waits until something is so.
func (n *node) waitFor(what string, is func() bool) {
	n.t.Helper()
	for end := time.Now().Add(harness.CallTimeout); !is(); time.Sleep(3 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("waited in vain for %s\n%s", what, n.Tail())
		}
	}
}
