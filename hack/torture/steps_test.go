// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import "fmt"

// step is one thing to do on a node. Its name is for those who read that it failed.
type step struct {
	name string
	do   func(n *node) error
}

// run does one step after the other, up to the first that fails.
func (n *node) run(steps ...step) error {
	for i, s := range steps {
		if err := s.do(n); err != nil {
			return fmt.Errorf("step %d of %d, %s: %w", i+1, len(steps), s.name, err)
		}
	}
	return nil
}

// then is a list of steps and further ones.
func then(steps []step, more ...step) []step { return append(steps[:len(steps):len(steps)], more...) }

func on(verb string, d *disk, do func(n *node, d *disk) error) step {
	return step{verb + " " + d.id, func(n *node) error { return do(n, d) }}
}

func create(d *disk) step    { return on("create", d, (*node).create) }
func remove(d *disk) step    { return on("delete", d, (*node).delete) }
func stage(d *disk) step     { return on("stage", d, (*node).stage) }
func unstage(d *disk) step   { return on("unstage", d, (*node).unstage) }
func publish(d *disk) step   { return on("publish", d, (*node).publish) }
func unpublish(d *disk) step { return on("unpublish", d, (*node).unpublish) }

// write and holds are what the disk's pod does.
func write(d *disk, word string) step {
	return on(fmt.Sprintf("write %q to", word), d, func(n *node, d *disk) error { return n.write(d, word) })
}

func holds(d *disk, words ...string) step {
	return on("read", d, func(n *node, d *disk) error { return n.holds(d, words...) })
}

func work(d *disk, word string) step {
	return on("do a job in", d, func(n *node, d *disk) error { return n.writeWork(d, word) })
}

func lacks(d *disk) step   { return on("find nothing in", d, (*node).lacks) }
func born(d *disk) step    { return on("find the content in", d, (*node).born) }
func flushes(d *disk) step { return on("look at the device of", d, (*node).flushes) }
func endIn(d *disk) step   { return on("unpublish and end", d, (*node).endIn) }
func mark(d *disk) step    { return on("ask for the commit of", d, (*node).mark) }
func unmark(d *disk) step  { return on("take back the mark of", d, (*node).unmark) }
func reboot(d *disk) step  { return on("reboot the node of", d, (*node).reboot) }

func expand(d *disk, bytes int64) step {
	return on("expand", d, func(n *node, d *disk) error { return n.expand(d, bytes) })
}

func expandOnNode(d *disk, bytes int64) step {
	return on("expand on the node", d, func(n *node, d *disk) error { return n.expandOnNode(d, bytes) })
}

func snapshot(name string, d *disk) step {
	return on("snapshot", d, func(n *node, d *disk) error { return n.snapshot(name, d) })
}

func deleteSnapshot(name string) step {
	return step{"delete snapshot " + name, func(n *node) error { return n.deleteSnapshot(name) }}
}

// use brings a disk to its pod, which writes to it.
func use(d *disk, word string) []step {
	if d.inline {
		return []step{publish(d), write(d, word)}
	}
	return []step{create(d), stage(d), publish(d), write(d, word)}
}

// unuse takes a disk away that use has brought.
func unuse(d *disk) []step {
	if d.inline {
		return []step{unpublish(d)}
	}
	return []step{unpublish(d), unstage(d), remove(d)}
}
