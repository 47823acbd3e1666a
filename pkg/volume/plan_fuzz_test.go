// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
)

// dice makes decisions of the fuzzer's bytes.
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

func (d *dice) home() home {
	h := home{path: []string{"", "/k/pods/u", "/k/plugins/p"}[d.roll(3)], gone: d.yes()}
	if d.yes() {
		h.doubt = "cannot be told"
	}
	return h
}

func (d *dice) places() []string {
	return []string{"/k/pods/u/v", "/mnt"}[:d.roll(3)]
}

// FuzzPlan holds the sweep against what it may do, said once more in other words: it
// never touches what may be another's, or of use to somebody.
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
				Record: Record{ID: fmt.Sprint("v", i), Lifecycle: []Lifecycle{Ephemeral, Persistent}[d.roll(2)], Mode: []Mode{ModeFilesystem, ModeDiskImage, ModeBlock}[d.roll(3)]},
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
				t.Errorf("half an action: %+v", a)
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
					isVolume && v.Lifecycle == Ephemeral && v.pod.gone && v.pod.doubt == "" && len(v.loops)+len(v.places) == 0
			case Detach:
				allowed = isVolume && v.Lifecycle == Persistent && v.Mode == ModeBlock && len(v.places) == 0 && v.staged.gone && v.staged.doubt == "" ||
					isLoop && l.ours && !l.autoClear && len(l.mounted) == 0
			}
			if !allowed {
				t.Errorf("%s %s, though %+v %+v", a.Verb, a.Object, v, l)
			}
		}
	})
}

// FuzzMountTable: from a mount table, of whoever's mounts, nothing is taken for a volume's
// that does not name its loop device, or its disk image, letter by letter.
func FuzzMountTable(f *testing.F) {
	f.Add("22 1 7:3 / /k/pods/u/v rw - ext4 /dev/loop3 rw\n23 1 0:5 /loop4 /k/p rw - devtmpfs devtmpfs rw\n24 1 0:30 / /k/t ro - tmpfs csi-disktemplate:img rw\n")
	f.Add("22 1 7:3 / /a\\040b rw shared:1 - xfs /dev/loop03 rw\n24 1 0:30 / /k ro - tmpfs csi-disktemplate:../x rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(text), nil)
		if err != nil {
			return
		}
		var entries []mountEntry
		for _, m := range mounts {
			entries = append(entries, mountEntry{at: m.Mountpoint, root: m.Root, fsType: m.FSType, source: m.Source})
		}
		table := tabulate(entries)
		named := func(at string, source func(mountEntry) bool) bool {
			return slices.ContainsFunc(entries, func(e mountEntry) bool { return e.at == at && source(e) })
		}
		for index, places := range table.byLoop {
			device := fmt.Sprint("/dev/loop", index)
			if i, ok := loopdev.IndexOf(device); !ok || i != index {
				t.Errorf("loop device %d", index)
			}
			for _, at := range places {
				if !named(at, func(e mountEntry) bool {
					return e.source == device || e.fsType == "devtmpfs" && "/dev"+e.root == device
				}) {
					t.Errorf("%s is no mount of %s", at, device)
				}
			}
		}
		for _, m := range table.images {
			if CheckID(m.id) != nil || !named(m.at, func(e mountEntry) bool { return e.fsType == "tmpfs" && e.source == imageSource(m.id) }) {
				t.Errorf("%+v is no disk image of ours", m)
			}
		}
		for _, m := range table.of(Record{ID: "img", Mode: ModeFilesystem}, []int{3}) {
			if !slices.Contains(table.byLoop[3], m) {
				t.Errorf("%s is no mount of the volume", m)
			}
		}
	})
}
