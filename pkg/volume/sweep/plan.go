// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// This file decides, and touches nothing: it makes a plan from what was seen on the node,
// and gives each action its reason. No decision depends on a clock.

// Verb is what to do about a find.
type Verb string

// The verbs.
const (
	Delete Verb = "delete" // an image
	Detach Verb = "detach" // a loop device
	Thaw   Verb = "thaw"   // a filesystem
	Kill   Verb = "kill"   // a process
	Commit Verb = "commit" // a volume that is kept for a golden
	Leave  Verb = "leave"  // nothing: somebody should look at it
)

// Action is one line of the plan.
type Action struct {
	Verb   Verb   `json:"verb"`
	Object string `json:"object"` // for people: what it is
	Path   string `json:"path"`   // where it is
	Reason string `json:"reason"`
	// Done, Skipped because the node had changed, or the error. An action that was only planned has none.
	Result string `json:"result,omitempty"`

	find any // one of the finds below
}

// Results of an [Action]. Any other result is the text of an error.
const (
	Done    = "done"
	Skipped = "skipped: it is no longer so"
)

// Failed reports whether an action could not be carried out.
func (a Action) Failed() bool { return a.Result != "" && a.Result != Done && a.Result != Skipped }

// finds is everything that a sweep has seen.
type finds struct {
	volumes      []foundVolume
	replacements []foundReplacement
	kept         []foundKept
	goldens      []foundGolden
	loops        []foundLoop
	mounts       []foundMount
	processes    []process.Process // that hold a half-made template open
	strange      []strange
}

// foundVolume is an image among the pool's volumes that has a record of ours.
type foundVolume struct {
	image.Record
	path   string
	frozen bool       // it has the mark that a plugin froze it
	loops  []int      // its devices
	places []string   // where it is mounted, anywhere
	pod    place.Home // for inline volumes
	staged place.Home // for block volumes; without a path if the image has no mark
}

// foundKept is the image of a volume that is gone, and is to be committed to a golden.
type foundKept struct {
	image.Record
	path     string
	outlived bool // the node has rebooted since it was made
	here     bool // this process commits
}

// foundGolden is a generation whose content a power cut has taken, before anybody was told of it.
type foundGolden struct {
	golden.Generation
	path string
}

// foundReplacement is a file that was to replace a volume's image.
type foundReplacement struct{ id, path string }

// foundLoop is a loop device whose file is on the pool's filesystem, and is not a volume of
// the pool.
type foundLoop struct {
	index     int
	file      string // path that the kernel keeps
	name      string // lo_file_name: the volume's id or [place.ReadyDevice], if ours is true
	ours      bool   // its file was one of the pool's volumes, and has no name any more
	autoClear bool
	mounted   []string // where it, or its node, is mounted
}

// foundMount is a mount that names a volume of this pool, though it is not at the volume's
// target.
type foundMount struct {
	at     string
	id     string
	target string // the volume's
}

// strange is a file in the pool that this plugin cannot make sense of.
type strange struct {
	object, path, why string
}

// plan decides what to do about each find.
func (f finds) plan() []Action {
	var actions []Action
	add := func(find any, verb Verb, object, path, reason string) {
		if verb != "" {
			actions = append(actions, Action{Verb: verb, Object: object, Path: path, Reason: reason, find: find})
		}
	}
	for _, p := range f.processes {
		add(p, Kill, fmt.Sprintf("process %d", p.PID), p.File,
			"it works on a template for a plugin that is dead, and nobody waits for it")
	}
	for _, v := range f.volumes {
		if v.frozen {
			add(v, Thaw, "volume "+v.ID, v.path, "a plugin froze its filesystem for a copy, and died before it could thaw it")
		}
		verb, reason := v.judge()
		add(v, verb, "volume "+v.ID, v.path, reason)
	}
	for _, r := range f.replacements {
		add(r, Delete, "replacement of volume "+r.id, r.path, "a process died before it could replace the volume's image with it, and the image is whole")
	}
	for _, k := range f.kept {
		verb, reason := k.judge()
		add(k, verb, "kept volume "+k.ID, k.path, reason)
	}
	for _, g := range f.goldens {
		add(g, Delete, "golden "+g.Generation.String(), g.path, "a power cut took its content, before its commit had ended")
	}
	for _, l := range f.loops {
		verb, reason := l.judge()
		add(l, verb, fmt.Sprintf("/dev/loop%d", l.index), l.file, reason)
	}
	for _, m := range f.mounts {
		add(m, Leave, "mount of volume "+m.id, m.at,
			fmt.Sprintf("the volume's target is %s; find out with findmnt whose mount this is", m.target))
	}
	for _, s := range f.strange {
		add(s, Leave, s.object, s.path, s.why)
	}
	return actions
}

// judge decides on a volume. An inline volume ends with its pod. A claim is deleted by
// DeleteVolume alone.
func (v foundVolume) judge() (Verb, string) {
	switch {
	case v.Lifecycle == image.Claim:
		return v.judgeStaging()
	case v.pod.Doubt != "":
		return Leave, v.pod.Doubt
	case !v.pod.Gone:
		return "", "" // kubelet publishes it again, or unpublishes it
	case len(v.places) > 0:
		return Leave, fmt.Sprintf("%s is gone, but the volume is mounted at %s: unmount it, and the next sweep deletes it", v.podName(), v.places[0])
	case len(v.loops) > 0:
		return Leave, fmt.Sprintf("%s is gone, but something holds /dev/loop%d, for example a copy of its mount in another mount namespace: the first sweep after that holder is gone deletes the volume", v.podName(), v.loops[0])
	}
	return Delete, fmt.Sprintf("%s is gone: there is no %s, so kubelet will never unpublish it", v.podName(), v.pod.Path)
}

func (v foundVolume) podName() string {
	if v.Pod == (image.Pod{}) {
		return "its pod"
	}
	return fmt.Sprintf("pod %s/%s (uid %s)", v.Pod.Namespace, v.Pod.Name, v.Pod.UID)
}

// judgeStaging decides on the devices of a block volume, which stay when its last user
// goes.
func (v foundVolume) judgeStaging() (Verb, string) {
	if v.Mode != image.ModeBlock || len(v.loops) == 0 || len(v.places) > 0 || v.staged.Path == "" {
		return "", ""
	}
	if v.staged.Doubt != "" {
		return Leave, v.staged.Doubt
	}
	if !v.staged.Gone {
		return "", ""
	}
	return Detach, fmt.Sprintf("it is attached as /dev/loop%d, but published nowhere, and the directory where it was staged, %s, is gone", v.loops[0], v.staged.Path)
}

// judge decides on a volume that is kept for a golden.
func (k foundKept) judge() (Verb, string) {
	switch {
	case k.outlived:
		return Delete, "the node has rebooted since it was made, so what was written to it may be missing, and it is not committed"
	case !k.here:
		return "", "" // the plugin goes on with it
	}
	return Commit, fmt.Sprintf("its pod is done, and it is to be the next generation of %s", k.CommitTo)
}

// judge decides on a loop device whose file is not a volume of the pool.
func (l foundLoop) judge() (Verb, string) {
	switch {
	case !l.ours:
		return "", "" // somebody else's file on the same filesystem, such as another pool's
	case len(l.mounted) > 0:
		return Leave, fmt.Sprintf("the image of %s was deleted, and the volume is still mounted at %s: copy the data from there, then unmount it", l.volume(), l.mounted[0])
	case l.autoClear: // the device of an image that is just being made or copied looks the same
		return "", ""
	}
	return Detach, fmt.Sprintf("the image of %s was deleted, and nothing has the device mounted", l.volume())
}

// volume names the volume whose device it was.
func (l foundLoop) volume() string {
	if l.name == place.ReadyDevice {
		return "an inline volume"
	}
	return "volume " + l.name
}
