// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"fmt"
	"strings"
	"time"
)

// operation is one call, and what is around it. Each list of steps may be empty.
type operation struct {
	name    string
	prepare []step // up to where the call is made
	call    step   // may be repeated
	check   []step // whether the call did what it answered
	giveUp  []step // takes away what an unanswered call may have done, and what was prepared
	end     []step // the same after an answered call
	forget  *disk  // kubelet may also forget this disk, which the sweep of the next start then deletes; nil if it may not
	undoes  bool   // a call that fails leaves the node as it was
	// long is for a call that takes long: each long-th of its effects is taken, and [longer] times as many where
	// somebody asked for torture.
	long int
}

// longer is how many times as many effects of a long call torture takes.
const longer = 12

// run is not the same for two runs that follow each other.
var run = int(time.Now().Unix())

// kinds is how many kinds of pool there are. They share the effects of a call: each takes every second one, and the others
// in the next run. Where somebody asked for torture, both take all.
const kinds = 2

// first is the first effect to take on a node, and stride leads to the next.
func (o operation) first(n *node) int { return 1 + (run+n.base.turn)%o.stride() }

func (o operation) stride() int {
	if thorough {
		return max(1, o.long/longer)
	}
	return max(kinds, o.long)
}

// those names effects, and how many are taken of them.
func (o operation) those(effects []string) string {
	if o.stride() == 1 {
		return "each of " + strings.Join(effects, ", ")
	}
	return fmt.Sprintf("one in %d of %s", o.stride(), strings.Join(effects, ", "))
}

const word, later = "written before", "written after"

// operations are everything that a container orchestrator asks for, some of it in several forms.
func operations() (all []operation) {
	for _, d := range []*disk{
		inline("inline-ext4", "ext4", "filesystem"), inline("inline-xfs", "xfs", "filesystem"),
		inline("inline-btrfs", "btrfs", "filesystem"), inline("inline-image", "ext4", "diskImage"),
	} {
		all = append(all, inlineOperations(d)...)
	}
	for _, d := range []*disk{volatile("volatile-ext4", "ext4"), volatile("volatile-xfs", "xfs")} {
		all = append(all, volatileOperations(d)...)
	}
	thick := claim("claim-thick", "ext4", "filesystem")
	thick.thick = true
	for _, d := range []*disk{
		claim("claim-ext4", "ext4", "filesystem"), claim("claim-xfs", "xfs", "filesystem"), claim("claim-block", "ext4", "block"),
		claim("claim-image", "ext4", "diskImage"), thick,
	} {
		all = append(all, claimOperations(d)...)
	}
	for _, d := range []*disk{claim("source-ext4", "ext4", "filesystem"), claim("source-xfs", "xfs", "filesystem"), claim("source-block", "ext4", "block")} {
		all = append(all, copyOperations(d)...)
	}
	for _, d := range []*disk{claim("grow-ext4", "ext4", "filesystem"), claim("grow-xfs", "xfs", "filesystem"), claim("grow-block", "ext4", "block")} {
		all = append(all, growOperations(d)...)
	}
	return all
}

func inlineOperations(d *disk) []operation {
	return []operation{{
		name:   "publish " + d.id,
		call:   publish(d),
		check:  []step{flushes(d), write(d, word), holds(d, word)},
		giveUp: []step{unpublish(d)},
		end:    []step{unpublish(d)},
		forget: d,
		undoes: true,
	}, {
		name:    "unpublish " + d.id,
		prepare: use(d, word),
		call:    unpublish(d),
		giveUp:  []step{unpublish(d)},
		forget:  d,
	}}
}

// volatileOperations are those of an inline volume, and its publish in another boot. Its device is given back after the
// answer to unpublish: if the plugin is killed before that, the device may be the next volume's.
func volatileOperations(d *disk) []operation {
	next := inline("after-"+d.id, d.fs, "filesystem")
	all := inlineOperations(d)
	all[1].call = endIn(d)
	all[1].end = []step{publish(next), flushes(next), unpublish(next)}
	return append(all, operation{
		name:    "publish in another boot " + d.id,
		prepare: then(use(d, word), reboot(d)),
		call:    publish(d),
		check:   []step{flushes(d), lacks(d), write(d, word), holds(d, word)},
		giveUp:  []step{unpublish(d)},
		end:     []step{unpublish(d)},
		forget:  d,
	})
}

func claimOperations(d *disk) []operation {
	return []operation{{
		name:   "create " + d.id,
		call:   create(d),
		check:  []step{stage(d), publish(d), write(d, word)},
		giveUp: []step{remove(d)},
		end:    unuse(d),
		undoes: true,
	}, {
		name:    "stage " + d.id,
		prepare: []step{create(d)},
		call:    stage(d),
		check:   []step{publish(d), write(d, word)},
		giveUp:  []step{unstage(d), remove(d)},
		end:     unuse(d),
	}, {
		name:    "publish " + d.id,
		prepare: []step{create(d), stage(d)},
		call:    publish(d),
		check:   []step{write(d, word)},
		giveUp:  unuse(d),
		end:     unuse(d),
	}, {
		name:    "unpublish " + d.id,
		prepare: use(d, word),
		call:    unpublish(d),
		check:   []step{stage(d), publish(d), holds(d, word)},
		giveUp:  unuse(d),
		end:     unuse(d),
	}, {
		name:    "unstage " + d.id,
		prepare: then(use(d, word), unpublish(d)),
		call:    unstage(d),
		check:   []step{stage(d), publish(d), holds(d, word)},
		giveUp:  unuse(d),
		end:     unuse(d),
	}, {
		name:    "delete " + d.id,
		prepare: []step{create(d)},
		call:    remove(d),
		giveUp:  []step{remove(d)},
	}}
}

// copyOperations make snapshots and copies of a volume that is in use. It must go on working whatever happens to them: a
// frozen filesystem would not take a write.
func copyOperations(d *disk) []operation {
	const snap = "snap"
	restored, cloned := copyOf(d.id+"-restored", d, snap), copyOf(d.id+"-cloned", d, "")
	thick := copyOf(d.id+"-thick", d, "")
	thick.thick = true
	// visit finds the word in a copy, which stays.
	visit := func(c *disk) []step {
		return []step{stage(c), publish(c), holds(c, word), unpublish(c), unstage(c)}
	}
	alive := []step{holds(d, word), write(d, word)}
	snapped := then(use(d, word), snapshot(snap, d), write(d, later))
	all := []operation{{
		name:    "snapshot " + d.id,
		prepare: use(d, word),
		call:    snapshot(snap, d),
		check:   then(then(then(alive, create(restored)), visit(restored)...), remove(restored)),
		giveUp:  then(then(alive, deleteSnapshot(snap)), unuse(d)...),
		end:     then([]step{deleteSnapshot(snap)}, unuse(d)...),
		undoes:  true,
	}, {
		name:    "delete snapshot of " + d.id,
		prepare: snapped,
		call:    deleteSnapshot(snap),
		giveUp:  then([]step{deleteSnapshot(snap)}, unuse(d)...),
		end:     unuse(d),
	}, {
		name:    "restore " + d.id,
		prepare: snapped,
		call:    create(restored),
		check:   visit(restored),
		giveUp:  then([]step{remove(restored), deleteSnapshot(snap)}, unuse(d)...),
		end:     then([]step{remove(restored), deleteSnapshot(snap)}, unuse(d)...),
		undoes:  true,
	}}
	for _, c := range []*disk{cloned, thick} {
		all = append(all, operation{
			name:    "clone " + c.id,
			prepare: use(d, word),
			call:    create(c),
			check:   visit(c),
			giveUp:  then(then([]step{remove(c)}, alive...), unuse(d)...),
			end:     then(then([]step{remove(c)}, alive...), unuse(d)...),
			undoes:  true,
		})
	}
	return all
}

func growOperations(d *disk) []operation {
	larger := 2 * d.bytes
	expansion := operation{
		name:    "expand " + d.id,
		prepare: use(d, word),
		call:    expand(d, larger),
		check:   []step{holds(d, word)},
		giveUp:  then([]step{holds(d, word)}, unuse(d)...),
		end:     then([]step{holds(d, word)}, unuse(d)...),
	}
	if d.fs == "ext4" && d.mode == "filesystem" { // without CAP_SYS_RESOURCE it grows when it is staged
		return []operation{expansion, {
			name:    "stage a larger " + d.id,
			prepare: then(use(d, word), unpublish(d), unstage(d), expand(d, larger)),
			call:    stage(d),
			check:   []step{publish(d), holds(d, word)},
			giveUp:  []step{unstage(d), remove(d)},
			end:     unuse(d),
		}}
	}
	return []operation{expansion, {
		name:    "expand in use " + d.id,
		prepare: then(use(d, word), expand(d, larger)),
		call:    expandOnNode(d, larger),
		check:   []step{holds(d, word)},
		giveUp:  then([]step{holds(d, word)}, unuse(d)...),
		end:     then([]step{holds(d, word)}, unuse(d)...),
	}}
}
