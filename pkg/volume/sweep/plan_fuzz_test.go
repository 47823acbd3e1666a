// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"fmt"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// dice makes decisions from the fuzzer's bytes.
type dice []byte

func (d *dice) roll(n int) int {
	if len(*d) == 0 {
		return 0
	}
	b := (*d)[0]
	*d = (*d)[1:]
	return int(b) % n
}

func (d *dice) yes() bool { return d.roll(2) == 1 }

func (d *dice) home() place.Home {
	h := place.Home{Path: []string{"", "/k/pods/u", "/k/plugins/p"}[d.roll(3)], Gone: d.yes()}
	if d.yes() {
		h.Doubt = "cannot be told"
	}
	return h
}

func (d *dice) places() []string {
	return []string{"/k/pods/u/v", "/mnt"}[:d.roll(3)]
}

// FuzzPlan checks every action of a plan by the rules, which are written here a second time.
// A sweep must never touch a thing that may be somebody else's, or that somebody may use.
func FuzzPlan(f *testing.F) {
	for i := range byte(24) {
		f.Add([]byte{1, 1, 1, 1, i, i >> 1, i >> 2, i >> 3, i, 1, 0, i, 1, i, 0, 1})
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d := dice(b)
		var seen finds
		volumes, loops := map[string]foundVolume{}, map[string]foundLoop{}
		for i := range d.roll(4) {
			v := foundVolume{
				Record: image.Record{ID: fmt.Sprint("v", i), Lifecycle: []image.Lifecycle{image.Inline, image.Claim}[d.roll(2)], Mode: []image.Mode{image.ModeFilesystem, image.ModeDiskImage, image.ModeBlock}[d.roll(3)]},
				path:   fmt.Sprint("/pool/volumes/v", i), frozen: d.yes(), loops: []int{3, 4}[:d.roll(3)], places: d.places(), pod: d.home(), staged: d.home(),
			}
			seen.volumes = append(seen.volumes, v)
			volumes["volume "+v.ID] = v
		}
		for i := range d.roll(4) {
			l := foundLoop{index: i, file: []string{"/data/x", "/pool/volumes/#1 (deleted)"}[d.roll(2)], name: "v", ours: d.yes(), autoClear: d.yes(), mounted: d.places()}
			seen.loops = append(seen.loops, l)
			loops[fmt.Sprint("/dev/loop", i)] = l
		}
		for i := range d.roll(3) {
			seen.replacements = append(seen.replacements, foundReplacement{fmt.Sprint("r", i), fmt.Sprintf("/pool/volumes/.r%d.new", i)})
			seen.strange = append(seen.strange, strange{"file s", "/pool/volumes/s", "no record"})
			seen.mounts = append(seen.mounts, foundMount{at: "/k/pods/w", id: "v", target: "/k/pods/u"})
			seen.processes = append(seen.processes, process.Process{PID: 100 + i, File: "/pool/templates/#1 (deleted)"})
		}
		for _, a := range seen.plan() {
			if a.Object == "" || a.Path == "" || a.Reason == "" {
				t.Errorf("an incomplete action: %+v", a)
			}
			v, isVolume := volumes[a.Object]
			l, isLoop := loops[a.Object]
			var allowed bool
			switch a.Verb {
			case Leave:
				allowed = true
			case Thaw:
				allowed = isVolume && v.frozen
			case Kill:
				allowed = strings.HasPrefix(a.Object, "process 10")
			case Delete:
				allowed = strings.HasPrefix(a.Object, "replacement of volume r") ||
					isVolume && v.Lifecycle == image.Inline && v.pod.Gone && v.pod.Doubt == "" && len(v.loops)+len(v.places) == 0
			case Detach:
				allowed = isVolume && v.Lifecycle == image.Claim && v.Mode == image.ModeBlock && len(v.places) == 0 && v.staged.Gone && v.staged.Doubt == "" ||
					isLoop && l.ours && !l.autoClear && len(l.mounted) == 0
			}
			if !allowed {
				t.Errorf("%s %s, though %+v %+v", a.Verb, a.Object, v, l)
			}
		}
	})
}
