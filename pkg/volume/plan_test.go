// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// TestPlan has every kind of debris, dead and alive, and what only looks like it.
func TestPlan(t *testing.T) {
	pod := Pod{Namespace: "ci", Name: "job-1", UID: "u1"}
	inline := func(change func(*foundVolume)) finds {
		v := foundVolume{
			Record: Record{ID: "csi-1", Mode: ModeFilesystem, Target: "/k/pods/u1/volumes/v/mount", Pod: pod},
			path:   "/pool/volumes/csi-1", pod: home{path: "/k/pods/u1", gone: true},
		}
		change(&v)
		return finds{volumes: []foundVolume{v}}
	}
	claim := func(mode Mode, change func(*foundVolume)) finds {
		v := foundVolume{Record: Record{ID: "pvc-1", Lifecycle: Persistent, Mode: mode}, path: "/pool/volumes/pvc-1", pod: home{gone: true}}
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
		"inline, no pod said, gone":     {inline(func(v *foundVolume) { v.Pod = Pod{} }), []Verb{Delete}, "its pod is gone"},
		"inline, disk image, gone":      {inline(func(v *foundVolume) { v.Mode = ModeDiskImage }), []Verb{Delete}, "is gone"},
		"inline, its pod there":         {inline(func(v *foundVolume) { v.pod.gone = false }), nil, ""},
		"inline, in use":                {inline(func(v *foundVolume) { v.pod.gone = false; v.loops = []int{3}; v.places = []string{v.Target} }), nil, ""},
		"inline, gone, yet mounted":     {inline(func(v *foundVolume) { v.loops = []int{3}; v.places = []string{"/mnt"} }), []Verb{Leave}, "mounted at /mnt"},
		"inline, gone, yet attached":    {inline(func(v *foundVolume) { v.loops = []int{3} }), []Verb{Leave}, "/dev/loop3"},
		"inline, nothing can be said":   {inline(func(v *foundVolume) { v.pod = home{doubt: "cannot be told"} }), []Verb{Leave}, "cannot be told"},
		"inline, doubt outweighs":       {inline(func(v *foundVolume) { v.pod.doubt = "cannot be told" }), []Verb{Leave}, "cannot be told"},
		"inline, frozen, its pod there": {inline(func(v *foundVolume) { v.pod.gone = false; v.frozen = true }), []Verb{Thaw}, "froze"},
		"inline, frozen, its pod gone":  {inline(func(v *foundVolume) { v.frozen = true }), []Verb{Thaw, Delete}, "froze"},
		"claim":                         {claim(ModeFilesystem, func(*foundVolume) {}), nil, ""},
		"claim, mounted":                {claim(ModeFilesystem, func(v *foundVolume) { v.loops = []int{3}; v.places = []string{"/k/plugins/s"} }), nil, ""},
		"claim, attached and not used":  {claim(ModeFilesystem, func(v *foundVolume) { v.loops = []int{3}; v.staged = home{path: "/k/s", gone: true} }), nil, ""},
		"claim, frozen":                 {claim(ModeFilesystem, func(v *foundVolume) { v.frozen = true }), []Verb{Thaw}, "froze"},
		"block, not attached":           {claim(ModeBlock, func(v *foundVolume) { v.staged = home{path: "/k/s", gone: true} }), nil, ""},
		"block, staged":                 {claim(ModeBlock, func(v *foundVolume) { v.loops = []int{3}; v.staged = home{path: "/k/s"} }), nil, ""},
		"block, its staging gone":       {claim(ModeBlock, func(v *foundVolume) { v.loops = []int{3}; v.staged = home{path: "/k/s", gone: true} }), []Verb{Detach}, "/k/s"},
		"block, published yet": {claim(ModeBlock, func(v *foundVolume) {
			v.loops = []int{3}
			v.places = []string{"/k/p"}
			v.staged = home{path: "/k/s", gone: true}
		}), nil, ""},
		"block, staged who knows where": {claim(ModeBlock, func(v *foundVolume) { v.loops = []int{3} }), nil, ""},
		"block, staging not to be seen": {claim(ModeBlock, func(v *foundVolume) {
			v.loops = []int{3}
			v.staged = home{path: "/k/s", gone: true, doubt: "cannot be told"}
		}), []Verb{Leave}, "cannot be told"},
		"disk image, staging gone":       {claim(ModeDiskImage, func(v *foundVolume) { v.staged = home{path: "/k/s", gone: true} }), nil, ""},
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
		"several, of which one is alive": {finds{replacements: []foundReplacement{{"a", "/pool/volumes/.a.new"}}, loops: lost(func(*foundLoop) {}).loops, volumes: inline(func(v *foundVolume) { v.pod.gone = false }).volumes}, []Verb{Delete, Detach}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []Verb
			var reasons []string
			for _, a := range c.finds.plan() {
				got = append(got, a.Verb)
				reasons = append(reasons, a.Reason)
				if a.Object == "" || a.Path == "" || a.Reason == "" || a.Result != "" {
					t.Errorf("half an action: %+v", a)
				}
			}
			if !slices.Equal(got, c.want) || !strings.Contains(strings.Join(reasons, "\n"), c.says) {
				t.Errorf("%v %q, expected %v with %q", got, reasons, c.want, c.says)
			}
		})
	}
}

func TestPodHome(t *testing.T) {
	for rel, want := range map[string]string{
		"pods/u1/volumes/kubernetes.io~csi/v/mount": "pods/u1",
		"pods/u1/v":         "pods/u1",
		"pods/u1":           "",
		"pods":              "",
		"pods//v":           "",
		"plugins/u1/v":      "",
		"x/pods/u1/v/mount": "",
		"":                  "",
	} {
		if got := podHome(rel); got != want {
			t.Errorf("%q: %q, expected %q", rel, got, want)
		}
	}
}

// TestTabulate takes from the mount table what names a loop device or a disk image.
func TestTabulate(t *testing.T) {
	table := tabulate([]mountEntry{
		{at: "/a", source: "/dev/loop3", fsType: "ext4", root: "/"},
		{at: "/b", source: "/dev/loop3", fsType: "ext4", root: "/sub"},
		{at: "/c", source: "devtmpfs", fsType: "devtmpfs", root: "/loop4"},
		{at: "/dev", source: "devtmpfs", fsType: "devtmpfs", root: "/"},
		{at: "/p", source: "/dev/loop3p1", fsType: "ext4", root: "/"},
		{at: "/d", source: "csi-disktemplate:img", fsType: "tmpfs", root: "/"},
		{at: "/e", source: "csi-disktemplate:../../etc", fsType: "tmpfs", root: "/"},
		{at: "/f", source: "csi-disktemplate:img", fsType: "ext4", root: "/"},
		{at: "/g", source: "csi-other:img", fsType: "tmpfs", root: "/"},
	})
	if !slices.Equal(table.byLoop[3], []string{"/a", "/b"}) || !slices.Equal(table.byLoop[4], []string{"/c"}) || len(table.byLoop) != 2 {
		t.Errorf("loop devices %v", table.byLoop)
	}
	if len(table.images) != 1 || table.images[0].at != "/d" || table.images[0].id != "img" {
		t.Errorf("disk images %v", table.images)
	}
	for r, want := range map[*Record]string{
		{ID: "v", Mode: ModeFilesystem}:    "/a /b /c",
		{ID: "img", Mode: ModeDiskImage}:   "/a /b /c /d",
		{ID: "img", Mode: ModeFilesystem}:  "/a /b /c",
		{ID: "other", Mode: ModeDiskImage}: "/a /b /c",
	} {
		if got := strings.Join(table.of(*r, []int{3, 4}), " "); got != want {
			t.Errorf("%+v: %s, expected %s", *r, got, want)
		}
	}
}
