// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package sweep

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// find looks at the node. It looks at devices before volumes, so it may see a device whose
// volume is deleted in between. Each device is looked at again before anything happens to
// it.
func (s *Sweeper) find(first bool) (finds, error) {
	var f finds
	loops, err := s.findLoops()
	if err != nil {
		return f, err
	}
	table, err := place.ReadTable()
	if err != nil {
		return f, err
	}
	if err := s.findVolumes(&f, loops, table); err != nil {
		return f, err
	}
	if err := s.findSnapshots(&f); err != nil {
		return f, err
	}
	if err := s.findKept(&f); err != nil {
		return f, err
	}
	if err := s.findGoldens(&f); err != nil {
		return f, err
	}
	if err := s.findLost(&f, loops, table); err != nil {
		return f, err
	}
	s.findMounts(&f, table)
	replaced, err := s.Pool.Replacements()
	if err != nil {
		return f, err
	}
	for _, id := range replaced {
		f.replacements = append(f.replacements, foundReplacement{id, s.Pool.Replacement(id)})
	}
	if first {
		if f.processes, err = process.HoldingUnnamed(s.templatesDir()); err != nil {
			return f, err
		}
	}
	return f, nil
}

// Mounted counts the volumes that are mounted somewhere on the node.
func (s *Sweeper) Mounted() (int, error) {
	if err := s.Pool.Check(); err != nil { // volumes are found by their paths
		return 0, err
	}
	loops, err := s.findLoops()
	if err != nil {
		return 0, err
	}
	table, err := place.ReadTable()
	if err != nil {
		return 0, err
	}
	var f finds
	if err := s.findVolumes(&f, loops, table); err != nil {
		return 0, err
	}
	n := 0
	for _, v := range f.volumes {
		if len(v.places) > 0 {
			n++
		}
	}
	return n, nil
}

func (s *Sweeper) templatesDir() string { return filepath.Dir(s.Pool.Template("x")) }

// findVolumes looks at all volumes, and removes their devices from loops.
func (s *Sweeper) findVolumes(f *finds, loops map[int]poolLoop, table place.Table) error {
	ids, err := s.Pool.Volumes()
	if err != nil {
		return err
	}
	devices := byInode(loops)
	found, errs := make([]foundVolume, len(ids)), make([]error, len(ids))
	image.Each(len(ids), func(i int) { found[i], errs[i] = s.findVolume(ids[i], devices, table) })
	f.volumes = found[:0] // what is to be reported otherwise, or not at all, is taken out
	for i, id := range ids {
		if errors.Is(errs[i], errdefs.ErrNotFound) { // deleted meanwhile
			continue
		}
		if errs[i] != nil {
			f.strange = append(f.strange, strange{"file " + id, s.Pool.Volume(id), errs[i].Error()})
			continue
		}
		f.volumes = append(f.volumes, found[i])
		for _, index := range found[i].loops {
			delete(loops, index)
		}
	}
	return nil
}

// byInode lists the devices of each file.
func byInode(loops map[int]poolLoop) map[image.FileID][]int {
	devices := map[image.FileID][]int{}
	for _, index := range slices.Sorted(maps.Keys(loops)) {
		of := loops[index].image
		devices[of] = append(devices[of], index)
	}
	return devices
}

// findVolume looks at one volume.
func (s *Sweeper) findVolume(id string, devices map[image.FileID][]int, table place.Table) (foundVolume, error) {
	if err := image.CheckID(id); err != nil {
		return foundVolume{}, fmt.Errorf("%w; the file is not one of ours: move it away", err)
	}
	img, err := s.Images.Open(id)
	if err != nil {
		return foundVolume{}, err
	}
	defer img.Close()
	fi, err := img.File.Stat()
	if err != nil {
		return foundVolume{}, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	v := foundVolume{Record: img.Record, path: img.Path(), loops: devices[image.FileID{Device: st.Dev, Inode: st.Ino}]}
	v.places = table.Of(v.Record, v.loops)
	if _, v.frozen, err = img.Frozen(); err != nil {
		return v, err
	}
	if v.Lifecycle == image.Inline {
		v.pod = s.Root.Pod(v.Target)
		return v, nil
	}
	staging, staged, err := img.Staged()
	if staged {
		v.staged = s.Root.Staging(staging)
	}
	return v, err
}

// findSnapshots looks for files among the snapshots that have no record of a snapshot.
func (s *Sweeper) findSnapshots(f *finds) error {
	ids, err := s.Pool.Snapshots()
	if err != nil {
		return err
	}
	for _, id := range ids {
		_, err := s.Images.GetSnapshot(id)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			f.strange = append(f.strange, strange{"file " + id, s.Pool.Snapshot(id), err.Error()})
		}
	}
	return nil
}

// findKept looks for volumes that are kept for a golden, and not committed yet.
func (s *Sweeper) findKept(f *finds) error {
	ids, err := s.Pool.Commits()
	if err != nil {
		return err
	}
	for _, id := range ids {
		k := foundKept{path: s.Pool.Commit(id), here: s.Commit != nil}
		img, err := s.Images.OpenKept(id)
		if err == nil {
			k.Record = img.Record
			img.Close()
			k.outlived, err = k.Outlived()
		}
		switch {
		case errors.Is(err, errdefs.ErrNotFound): // committed meanwhile
		case err != nil:
			f.strange = append(f.strange, strange{"file " + id, k.path, err.Error()})
		default:
			f.kept = append(f.kept, k)
		}
	}
	return nil
}

// findGoldens looks for generations without content, and for files that are none of ours.
func (s *Sweeper) findGoldens(f *finds) error {
	names, err := s.Goldens.Strange()
	if err != nil {
		return err
	}
	for _, name := range names {
		f.strange = append(f.strange, strange{"file " + name, s.Pool.Golden(name), "its name is not that of a golden; move it away"})
	}
	all, err := s.Goldens.List()
	if err != nil {
		return err
	}
	for _, g := range all {
		if torn, err := s.Goldens.Torn(g); err != nil {
			return err
		} else if torn {
			f.goldens = append(f.goldens, foundGolden{g, s.Goldens.Path(g)})
		}
	}
	return nil
}

// findLost keeps those of the remaining loop devices whose volume was deleted.
func (s *Sweeper) findLost(f *finds, loops map[int]poolLoop, table place.Table) (err error) {
	var named map[image.FileID]string // read if there is a device to ask for
	for index, l := range loops {
		if !l.ours {
			continue
		}
		if named == nil {
			if named, err = s.Images.IDs(); err != nil {
				return err
			}
		}
		if named[l.image] != "" { // the device of a volume that cannot be read
			continue
		}
		l.mounted = table.ByLoop[index]
		f.loops = append(f.loops, l.foundLoop)
	}
	return nil
}

// findMounts looks for mounted disk images that are not at the target of their volume.
func (s *Sweeper) findMounts(f *finds, table place.Table) {
	targets := map[string]string{}
	for _, v := range f.volumes {
		if v.Lifecycle == image.Inline {
			targets[v.ID] = v.Target
		}
	}
	for _, d := range table.Disks {
		if target, ours := targets[d.ID]; ours && d.At != s.Root.AsMounted(target) {
			f.mounts = append(f.mounts, foundMount{at: d.At, id: d.ID, target: target})
		}
	}
}

// poolLoop is a loop device whose file is on the pool's filesystem.
type poolLoop struct {
	foundLoop
	image image.FileID
}

// findLoops lists the loop devices whose file is on the pool's filesystem, by index. The
// inode decides, and not the file's path: the kernel does not know the path if the plugin
// that attached the device had another mount namespace.
func (s *Sweeper) findLoops() (map[int]poolLoop, error) {
	all, err := loopdev.Attached()
	if err != nil {
		return nil, err
	}
	dir, err := os.Stat(s.Images.Dir())
	if err != nil {
		return nil, err
	}
	filesystem := dir.Sys().(*syscall.Stat_t).Dev
	loops := map[int]poolLoop{}
	for _, index := range all {
		l, here, err := s.findLoop(index, filesystem)
		if errors.Is(err, loopdev.ErrNotAttached) || errors.Is(err, os.ErrNotExist) { // detached or removed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if here {
			loops[index] = l
		}
	}
	return loops, nil
}

// findLoop looks at one device. If its file is on another filesystem than the pool's, it
// looks no further, since it must not fail because of somebody else's device.
func (s *Sweeper) findLoop(index int, filesystem uint64) (l poolLoop, here bool, err error) {
	dev, err := loopdev.Open(index)
	if err != nil {
		return l, false, err
	}
	defer dev.Close()
	info, err := dev.Info()
	if err != nil || info.Device != filesystem {
		return l, false, err
	}
	file, err := loopdev.BackingFile(index)
	if err != nil {
		return l, false, err
	}
	ours, err := s.madeAs(index, info.Name)
	return poolLoop{
		foundLoop: foundLoop{index: index, file: file, name: info.Name, autoClear: info.AutoClear, ours: ours},
		image:     image.FileID{Device: info.Device, Inode: info.Inode},
	}, true, err
}

// madeAs reports whether a device was attached to a file that was made as a volume. Its name is a volume's id, or that of
// a device whose volume had none yet.
func (s *Sweeper) madeAs(index int, name string) (bool, error) {
	was, err := s.Images.WasVolume(index)
	whole := (image.CheckID(name) == nil || name == place.ReadyDevice) && len(name) < loopdev.MaxName
	return was && whole, err
}
