// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// The sweep first looks, then decides, then acts. This file decides, and touches
// nothing: from what was seen on the node to what is to be done, each with its reason.
// Whatever is not provably of this pool, and provably of no more use to anybody, is
// left alone. No decision depends on a clock.

// Verb is what is done with a find.
type Verb string

// The verbs.
const (
	Delete Verb = "delete" // an image
	Detach Verb = "detach" // a loop device
	Thaw   Verb = "thaw"   // a filesystem
	Kill   Verb = "kill"   // a process
	Leave  Verb = "leave"  // it is not for the sweep to decide: somebody should look at it
)

// Action is one line of the plan.
type Action struct {
	Verb   Verb   `json:"verb"`
	Object string `json:"object"` // for people: what it is
	Path   string `json:"path"`   // where it is
	Reason string `json:"reason"`
	// Result tells what came of it, when it was carried out: Done, Skipped because it
	// was no longer so, or the error. It is "" for what was only planned.
	Result string `json:"result,omitempty"`

	find any // one of the finds below
}

// What came of an [Action]; any other word is an error's.
const (
	Done    = "done"
	Skipped = "skipped: it is no longer so"
)

// Failed reports whether an action could not be carried out.
func (a Action) Failed() bool { return a.Result != "" && a.Result != Done && a.Result != Skipped }

// finds are all that a sweep has seen.
type finds struct {
	volumes      []foundVolume
	replacements []foundReplacement
	loops        []foundLoop
	mounts       []foundMount
	processes    []process.Process // that hold a template open which is being made
	strange      []strange
}

// home is what kubelet's directory tells of a user of a volume.
type home struct {
	path  string // whose existence decides
	gone  bool   // proven
	doubt string // why nothing can be said; "" if something can
}

// foundVolume is an image among the pool's volumes that has a record of ours.
type foundVolume struct {
	Record
	path   string
	frozen bool     // its plugin has frozen it
	loops  []int    // its devices
	places []string // where it is mounted, anywhere
	pod    home     // of ephemeral volumes
	staged home     // of block volumes; no path if they do not say where
}

// foundReplacement is what was to take the place of a volume's image.
type foundReplacement struct{ id, path string }

// foundLoop is a loop device whose file is on the pool's filesystem, and has no name in
// the pool.
type foundLoop struct {
	index     int
	file      string // as the kernel has it
	name      string // lo_file_name: of ours, the volume's id
	ours      bool   // its file was one of the pool's volumes, and has no name any more
	autoClear bool
	mounted   []string // where it, or its node, is mounted
}

// foundMount is what is mounted below the kubelet's directory and names a volume of
// this pool, though the volume is not for that place.
type foundMount struct {
	at     string
	id     string
	target string // the volume's
}

// strange is what is in the pool and makes no sense to this plugin.
type strange struct {
	object, path, why string
}

// plan decides.
func (f finds) plan() []Action {
	var actions []Action
	add := func(find any, verb Verb, object, path, reason string) {
		if verb != "" {
			actions = append(actions, Action{Verb: verb, Object: object, Path: path, Reason: reason, find: find})
		}
	}
	for _, p := range f.processes {
		add(p, Kill, fmt.Sprintf("process %d", p.PID), p.File,
			"it holds a template open that a plugin was making which is dead: nobody waits for it")
	}
	for _, v := range f.volumes {
		if v.frozen {
			add(v, Thaw, "volume "+v.ID, v.path, "a plugin froze its filesystem for a copy, and died before it could thaw it")
		}
		verb, reason := v.judge()
		add(v, verb, "volume "+v.ID, v.path, reason)
	}
	for _, r := range f.replacements {
		add(r, Delete, "replacement of volume "+r.id, r.path, "a process died before it could put it in the place of the volume, which is whole without it")
	}
	for _, l := range f.loops {
		verb, reason := l.judge()
		add(l, verb, fmt.Sprintf("/dev/loop%d", l.index), l.file, reason)
	}
	for _, m := range f.mounts {
		add(m, Leave, "mount of volume "+m.id, m.at,
			fmt.Sprintf("the volume is for %s; see with findmnt whose mount it is", m.target))
	}
	for _, s := range f.strange {
		add(s, Leave, s.object, s.path, s.why)
	}
	return actions
}

// judge decides on a volume. An ephemeral one ends with its pod, a persistent one is
// deleted by who created it, and by nobody else.
func (v foundVolume) judge() (Verb, string) {
	switch {
	case v.Lifecycle == Persistent:
		return v.judgeStaging()
	case v.pod.doubt != "":
		return Leave, v.pod.doubt
	case !v.pod.gone:
		return "", "" // kubelet publishes it again, or unpublishes it
	case len(v.places) > 0:
		return Leave, fmt.Sprintf("%s is gone, but it is mounted at %s: unmount that, and the next sweep deletes it", v.podName(), v.places[0])
	case len(v.loops) > 0:
		return Leave, fmt.Sprintf("%s is gone, but something holds /dev/loop%d, as a copy of its mount in another mount namespace does: the sweep after that ends deletes it", v.podName(), v.loops[0])
	}
	return Delete, fmt.Sprintf("%s is gone: there is no %s, so that kubelet will never unpublish it", v.podName(), v.pod.path)
}

func (v foundVolume) podName() string {
	if v.Pod == (Pod{}) {
		return "its pod"
	}
	return fmt.Sprintf("pod %s/%s (uid %s)", v.Pod.Namespace, v.Pod.Name, v.Pod.UID)
}

// judgeStaging decides on the devices of a block volume: they stay when its last user
// goes.
func (v foundVolume) judgeStaging() (Verb, string) {
	if v.Mode != ModeBlock || len(v.loops) == 0 || len(v.places) > 0 || v.staged.path == "" {
		return "", ""
	}
	if v.staged.doubt != "" {
		return Leave, v.staged.doubt
	}
	if !v.staged.gone {
		return "", ""
	}
	return Detach, fmt.Sprintf("it is attached as /dev/loop%d, but published nowhere, and the directory where it was staged is gone: %s", v.loops[0], v.staged.path)
}

// judge decides on a loop device whose file is no volume of the pool.
func (l foundLoop) judge() (Verb, string) {
	switch {
	case !l.ours:
		return "", "" // somebody else's file on the same filesystem, as another pool's
	case len(l.mounted) > 0:
		return Leave, fmt.Sprintf("the image of volume %s was deleted while it is mounted at %s: copy what is needed from there", l.name, l.mounted[0])
	case l.autoClear: // what is just being made, or copied, looks the same
		return "", ""
	}
	return Detach, fmt.Sprintf("the image of volume %s was deleted, and nothing has the device mounted", l.name)
}

// podHome finds, in the path of a target, whose existence tells of the pod's: kubelet
// removes a pod's directory when it is done with all that the pod had, and not before.
// It is "" for another container orchestrator's paths, of which nothing is known.
func podHome(rel string) string {
	parts := strings.Split(rel, string(filepath.Separator))
	if len(parts) < 3 || parts[0] != "pods" || parts[1] == "" {
		return ""
	}
	return filepath.Join(parts[0], parts[1])
}

// mountTable is what a sweep wants of the mount table.
type mountTable struct {
	byLoop map[int][]string // where a loop device, or its node, is mounted
	images []foundMount     // the tmpfs of ModeDiskImage volumes; whose is not decided
}

// mountEntry is a line of proc_pid_mountinfo(5).
type mountEntry struct {
	at, root, fsType, source string
}

// tabulate sorts mounts, of whoever.
func tabulate(entries []mountEntry) mountTable {
	t := mountTable{byLoop: map[int][]string{}}
	for _, e := range entries {
		device := e.source
		if e.fsType == "devtmpfs" { // a bind of the node: its root is the node's path there
			device = "/dev" + e.root
		}
		if index, ok := loopdev.IndexOf(device); ok {
			t.byLoop[index] = append(t.byLoop[index], e.at)
		}
		if id, ok := strings.CutPrefix(e.source, imageSource("")); ok && e.fsType == "tmpfs" && CheckID(id) == nil {
			t.images = append(t.images, foundMount{at: e.at, id: id})
		}
	}
	return t
}

// of tells where a volume is mounted.
func (t mountTable) of(r Record, loops []int) []string {
	var places []string
	for _, index := range loops {
		places = append(places, t.byLoop[index]...)
	}
	for _, m := range t.images {
		if r.Mode == ModeDiskImage && m.id == r.ID {
			places = append(places, m.at)
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(places)))
}
