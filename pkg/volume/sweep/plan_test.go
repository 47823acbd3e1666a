// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// TestPlan has every kind of find: dead ones, ones in use, and ones that only look dead.
func TestPlan(t *testing.T) {
	pod := image.Pod{Namespace: "ci", Name: "job-1", UID: "u1"}
	inline := func(change func(*foundVolume)) finds {
		v := foundVolume{
			Record: image.Record{ID: "csi-1", Mode: image.ModeFilesystem, Target: "/k/pods/u1/volumes/v/mount", Pod: pod},
			path:   "/pool/volumes/csi-1", pod: place.Home{Path: "/k/pods/u1", Gone: true},
		}
		change(&v)
		return finds{volumes: []foundVolume{v}}
	}
	claim := func(mode image.Mode, change func(*foundVolume)) finds {
		v := foundVolume{Record: image.Record{ID: "pvc-1", Lifecycle: image.Claim, Mode: mode}, path: "/pool/volumes/pvc-1", pod: place.Home{Gone: true}}
		change(&v)
		return finds{volumes: []foundVolume{v}}
	}
	lost := func(change func(*foundLoop)) finds {
		l := foundLoop{index: 7, file: "/pool/volumes/#12 (deleted)", name: "pvc-1", ours: true}
		change(&l)
		return finds{loops: []foundLoop{l}}
	}
	for name, c := range map[string]struct {
		finds finds
		want  []Verb
		says  string // in the reason
	}{
		"nothing": {},

		"inline, its pod gone":          {inline(func(*foundVolume) {}), []Verb{Delete}, "pod ci/job-1 (uid u1) is gone: there is no /k/pods/u1"},
		"inline, no pod said, gone":     {inline(func(v *foundVolume) { v.Pod = image.Pod{} }), []Verb{Delete}, "its pod is gone"},
		"inline, disk image, gone":      {inline(func(v *foundVolume) { v.Mode = image.ModeDiskImage }), []Verb{Delete}, "is gone"},
		"inline, its pod there":         {inline(func(v *foundVolume) { v.pod.Gone = false }), nil, ""},
		"inline, in use":                {inline(func(v *foundVolume) { v.pod.Gone = false; v.loops = []int{3}; v.places = []string{v.Target} }), nil, ""},
		"inline, gone, yet mounted":     {inline(func(v *foundVolume) { v.loops = []int{3}; v.places = []string{"/mnt"} }), []Verb{Leave}, "mounted at /mnt"},
		"inline, gone, yet attached":    {inline(func(v *foundVolume) { v.loops = []int{3} }), []Verb{Leave}, "/dev/loop3"},
		"inline, nothing can be said":   {inline(func(v *foundVolume) { v.pod = place.Home{Doubt: "cannot be told"} }), []Verb{Leave}, "cannot be told"},
		"inline, doubt outweighs":       {inline(func(v *foundVolume) { v.pod.Doubt = "cannot be told" }), []Verb{Leave}, "cannot be told"},
		"inline, frozen, its pod there": {inline(func(v *foundVolume) { v.pod.Gone = false; v.frozen = true }), []Verb{Thaw}, "froze"},
		"inline, frozen, its pod gone":  {inline(func(v *foundVolume) { v.frozen = true }), []Verb{Thaw, Delete}, "froze"},
		"claim":                         {claim(image.ModeFilesystem, func(*foundVolume) {}), nil, ""},
		"claim, mounted":                {claim(image.ModeFilesystem, func(v *foundVolume) { v.loops = []int{3}; v.places = []string{"/k/plugins/s"} }), nil, ""},
		"claim, attached and not used":  {claim(image.ModeFilesystem, func(v *foundVolume) { v.loops = []int{3}; v.staged = place.Home{Path: "/k/s", Gone: true} }), nil, ""},
		"claim, frozen":                 {claim(image.ModeFilesystem, func(v *foundVolume) { v.frozen = true }), []Verb{Thaw}, "froze"},
		"block, not attached":           {claim(image.ModeBlock, func(v *foundVolume) { v.staged = place.Home{Path: "/k/s", Gone: true} }), nil, ""},
		"block, staged":                 {claim(image.ModeBlock, func(v *foundVolume) { v.loops = []int{3}; v.staged = place.Home{Path: "/k/s"} }), nil, ""},
		"block, its staging gone":       {claim(image.ModeBlock, func(v *foundVolume) { v.loops = []int{3}; v.staged = place.Home{Path: "/k/s", Gone: true} }), []Verb{Detach}, "/k/s"},
		"block, published yet": {claim(image.ModeBlock, func(v *foundVolume) {
			v.loops = []int{3}
			v.places = []string{"/k/p"}
			v.staged = place.Home{Path: "/k/s", Gone: true}
		}), nil, ""},
		"block, staged who knows where": {claim(image.ModeBlock, func(v *foundVolume) { v.loops = []int{3} }), nil, ""},
		"block, staging not to be seen": {claim(image.ModeBlock, func(v *foundVolume) {
			v.loops = []int{3}
			v.staged = place.Home{Path: "/k/s", Gone: true, Doubt: "cannot be told"}
		}), []Verb{Leave}, "cannot be told"},
		"disk image, staging gone":       {claim(image.ModeDiskImage, func(v *foundVolume) { v.staged = place.Home{Path: "/k/s", Gone: true} }), nil, ""},
		"replacement":                    {finds{replacements: []foundReplacement{{"pvc-1", "/pool/volumes/.pvc-1.new"}}}, []Verb{Delete}, "died before"},
		"loop of a deleted image":        {lost(func(*foundLoop) {}), []Verb{Detach}, "image of volume pvc-1 was deleted"},
		"the same, mounted":              {lost(func(l *foundLoop) { l.mounted = []string{"/k/p"} }), []Verb{Leave}, "/k/p"},
		"the same, mounted, autoclear":   {lost(func(l *foundLoop) { l.mounted = []string{"/k/p"}; l.autoClear = true }), []Verb{Leave}, "/k/p"},
		"an image that is being made":    {lost(func(l *foundLoop) { l.autoClear = true }), nil, ""},
		"a user's own loop":              {lost(func(l *foundLoop) { l.ours = false; l.name = "/data/disk.img"; l.file = "/data/disk.img" }), nil, ""},
		"another pool's loop":            {lost(func(l *foundLoop) { l.ours = false; l.file = "/other/volumes/#12 (deleted)" }), nil, ""},
		"a mount at the wrong place":     {finds{mounts: []foundMount{{at: "/k/pods/u2/x", id: "csi-1", target: "/k/pods/u1/v"}}}, []Verb{Leave}, "/k/pods/u1/v"},
		"a formatting VM of a dead one":  {finds{processes: []process.Process{{PID: 77, File: "/pool/templates/#9 (deleted)"}}}, []Verb{Kill}, "nobody waits"},
		"a file that is not ours":        {finds{strange: []strange{{"file notes.txt", "/pool/volumes/notes.txt", "no record"}}}, []Verb{Leave}, "no record"},
		"a record of a newer version":    {finds{strange: []strange{{"file v", "/pool/volumes/v", "upgrade the plugin"}}}, []Verb{Leave}, "upgrade"},
		"several, of which one is alive": {finds{replacements: []foundReplacement{{"a", "/pool/volumes/.a.new"}}, loops: lost(func(*foundLoop) {}).loops, volumes: inline(func(v *foundVolume) { v.pod.Gone = false }).volumes}, []Verb{Delete, Detach}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []Verb
			var reasons []string
			for _, a := range c.finds.plan() {
				got = append(got, a.Verb)
				reasons = append(reasons, a.Reason)
				if a.Object == "" || a.Path == "" || a.Reason == "" || a.Result != "" {
					t.Errorf("an incomplete action: %+v", a)
				}
			}
			if !slices.Equal(got, c.want) || !strings.Contains(strings.Join(reasons, "\n"), c.says) {
				t.Errorf("%v %q, expected %v with %q", got, reasons, c.want, c.says)
			}
		})
	}
}
