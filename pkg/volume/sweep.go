// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Sweep says how to sweep.
type Sweep struct {
	// DryRun makes the plan and changes nothing. It may be made beside a living
	// plugin; anything else may be done by who owns the pool alone, see
	// [pool.Pool.Own].
	DryRun bool
	// First tells that this process has not begun to work yet, so that whatever is
	// half-made is another's, and dead.
	First bool
	// Hold keeps other operations from a volume until done is called. An error leaves
	// the volume to the next sweep. nil is for who does nothing else meanwhile.
	Hold func(id string) (done func(), err error)
}

// Sweep takes away what crashes, reboots and lost calls have left on the node: what is
// provably of this pool, and provably of no more use. All else that it finds odd is
// left, and reported. It returns the plan with what came of it. An error means that there
// was none, or, with the actions until then, that ctx ended.
func (m *Manager) Sweep(ctx context.Context, s Sweep) ([]Action, error) {
	// In a pool that is not the one that was opened nothing would be what it seems.
	err := m.pool.Check()
	if err == nil {
		err = m.recount()
	}
	var found finds
	if err == nil {
		found, err = m.find(s.First)
	}
	if err != nil {
		return nil, fmt.Errorf("looking for what was left behind: %w", err)
	}
	actions := found.plan()
	if s.DryRun {
		return actions, nil
	}
	for i := range actions {
		if ctx.Err() != nil {
			actions = actions[:i]
			break
		}
		m.carryOut(&actions[i], s)
	}
	m.reported = report(actions, m.reported)
	return actions, context.Cause(ctx)
}

// report logs what was done, and of what was left only what it had not before.
func report(actions []Action, before map[string]bool) map[string]bool {
	left := map[string]bool{}
	for _, a := range actions {
		pairs := []any{"object", a.Object, "path", a.Path, "reason", a.Reason, "result", a.Result}
		switch {
		case a.Verb != Leave && a.Result != Skipped:
			klog.InfoS("Sweep: "+string(a.Verb), pairs...)
		case a.Verb == Leave:
			key := a.Path + " " + a.Reason
			if left[key] = true; !before[key] {
				klog.InfoS("Sweep: leave", pairs...)
			}
		}
	}
	return left
}

// find looks at the node. Devices first, and what has them after: a device that was
// seen before its volume was deleted is looked at again before anything happens to it.
func (m *Manager) find(first bool) (finds, error) {
	var f finds
	loops, err := m.findLoops()
	if err != nil {
		return f, err
	}
	table, err := readMounts()
	if err != nil {
		return f, err
	}
	ids, err := m.pool.Volumes()
	if err != nil {
		return f, err
	}
	targets := map[string]string{}
	for _, id := range ids {
		v, err := m.findVolume(id, loops, table)
		if errors.Is(err, ErrNotFound) { // meanwhile
			continue
		}
		if err != nil {
			f.strange = append(f.strange, strange{"file " + id, m.pool.Volume(id), err.Error()})
			continue
		}
		f.volumes = append(f.volumes, v)
		if v.Lifecycle == Ephemeral {
			targets[id] = v.Target
		}
		for _, index := range v.loops {
			delete(loops, index)
		}
	}
	if err := m.findSnapshots(&f); err != nil {
		return f, err
	}
	for index, l := range loops {
		if !l.ours {
			continue
		}
		if named, err := m.hasName(l); err != nil {
			return f, err
		} else if named { // of a volume that cannot be read
			continue
		}
		l.mounted = table.byLoop[index]
		f.loops = append(f.loops, l.foundLoop)
	}
	for _, mnt := range table.images {
		if target, ours := targets[mnt.id]; ours && mnt.at != m.asMounted(target) {
			mnt.target = target
			f.mounts = append(f.mounts, mnt)
		}
	}
	replaced, err := m.pool.Replacements()
	if err != nil {
		return f, err
	}
	for _, id := range replaced {
		f.replacements = append(f.replacements, foundReplacement{id, m.pool.Replacement(id)})
	}
	if first {
		if f.processes, err = process.HoldingUnnamed(m.templatesDir()); err != nil {
			return f, err
		}
	}
	return f, nil
}

// asMounted is a path below the kubelet's directory as the mount table has it.
func (m *Manager) asMounted(path string) string {
	rel, err := m.relative(path)
	if err != nil {
		return path
	}
	return filepath.Join(m.mountPath, rel)
}

func (m *Manager) volumesDir() string   { return filepath.Dir(m.pool.Volume("x")) }
func (m *Manager) templatesDir() string { return filepath.Dir(m.pool.Template("x")) }

// poolLoop is a loop device whose file is on the pool's filesystem.
type poolLoop struct {
	foundLoop
	device, inode uint64
}

// findLoops lists those, by their index. The file decides and not its name, which the
// kernel cannot tell where the plugin that attached it had another mount namespace.
func (m *Manager) findLoops() (map[int]poolLoop, error) {
	all, err := loopdev.Attached()
	if err != nil {
		return nil, err
	}
	var dir syscall.Stat_t
	if err := syscall.Stat(m.volumesDir(), &dir); err != nil {
		return nil, &os.PathError{Op: "stat", Path: m.volumesDir(), Err: err}
	}
	loops := map[int]poolLoop{}
	for _, index := range all {
		l, here, err := m.findLoop(index, dir.Dev)
		if errors.Is(err, loopdev.ErrNotAttached) || errors.Is(err, os.ErrNotExist) { // detached, or removed, meanwhile
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

// findLoop looks at one. Whose file is on another filesystem than the pool's is not looked
// at any further: what is wrong with it is none of our business.
func (m *Manager) findLoop(index int, filesystem uint64) (l poolLoop, here bool, err error) {
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
	lost, err := m.deviceOf(dev, &image{Record: Record{ID: info.Name}})
	return poolLoop{
		foundLoop: foundLoop{index: index, file: file, name: info.Name, autoClear: info.AutoClear, ours: lost && CheckID(info.Name) == nil},
		device:    info.Device, inode: info.Inode,
	}, true, err
}

// readMounts reads the mount table, of all that this process can see.
func readMounts() (mountTable, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return mountTable{}, fmt.Errorf("read mountinfo: %w", err)
	}
	var entries []mountEntry
	for _, i := range mounts {
		entries = append(entries, mountEntry{at: i.Mountpoint, root: i.Root, fsType: i.FSType, source: i.Source})
	}
	return tabulate(entries), nil
}

// findVolume looks at one image.
func (m *Manager) findVolume(id string, loops map[int]poolLoop, table mountTable) (foundVolume, error) {
	if err := CheckID(id); err != nil {
		return foundVolume{}, fmt.Errorf("%w; the file is not one of ours: move it away", err)
	}
	img, err := m.open(id)
	if err != nil {
		return foundVolume{}, err
	}
	defer img.Close()
	fi, err := img.Stat()
	if err != nil {
		return foundVolume{}, err
	}
	st := fi.Sys().(*syscall.Stat_t)
	v := foundVolume{Record: img.Record, path: img.Name()}
	for index, l := range loops {
		if l.device == st.Dev && l.inode == st.Ino {
			v.loops = append(v.loops, index)
		}
	}
	v.places = table.of(v.Record, v.loops)
	var since time.Time
	if err := pool.GetRecord(img.File, pool.FrozenAttr, &since); err == nil {
		v.frozen = true
	} else if !errors.Is(err, pool.ErrNoRecord) {
		return v, err
	}
	if v.Lifecycle == Ephemeral {
		v.pod = m.podOf(v.Target)
		return v, nil
	}
	var staging string
	if err := pool.GetRecord(img.File, pool.StagedAttr, &staging); err == nil {
		v.staged = m.homeAt(staging, func(rel string) string { return rel })
	} else if !errors.Is(err, pool.ErrNoRecord) {
		return v, err
	}
	return v, nil
}

// podOf tells whether the pod that a target is for is still there.
func (m *Manager) podOf(target string) home {
	if err := m.seesPods(); err != nil {
		return home{doubt: fmt.Sprintf("whether its pod is gone cannot be told: %v; set --kubelet-dir to the kubelet's root directory", err)}
	}
	return m.homeAt(target, podHome)
}

// seesPods is an error where all pods would seem to be gone, as where kubelet's disk is
// not mounted yet. Of a kubelet that has run there is always a pod: the plugin's own.
func (m *Manager) seesPods() error {
	if same, err := sameFile(m.root, m.mountPath); err != nil || !same {
		return errors.Join(err, fmt.Errorf("%s is not the directory that it was at start", m.rootPath))
	}
	pods, err := mount.OpenTarget(m.root, "pods", syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer pods.Close()
	dir, err := mount.Open(pods)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := dir.Readdirnames(1); err != nil {
		return fmt.Errorf("there is no pod in %s: %w", pods.Name(), err)
	}
	return nil
}

// homeAt tells whether the part of a path that decides is there.
func (m *Manager) homeAt(path string, decides func(rel string) string) home {
	rel, err := m.relative(path)
	if err != nil {
		return home{path: path, doubt: fmt.Sprintf("whether it is still wanted cannot be told: %v", err)}
	}
	part := decides(rel)
	if part == "" {
		return home{path: path, doubt: fmt.Sprintf("whether its pod is gone cannot be told: %s is no path of a kubelet's; unpublish it", path)}
	}
	h := home{path: filepath.Join(m.rootPath, part)}
	f, err := mount.OpenTarget(m.root, part, 0)
	switch {
	case err == nil:
		f.Close()
	case errors.Is(err, os.ErrNotExist):
		h.gone = true
	default:
		h.doubt = fmt.Sprintf("whether it is still wanted cannot be told: %v", err)
	}
	return h
}

// findSnapshots looks for what is no snapshot of ours.
func (m *Manager) findSnapshots(f *finds) error {
	ids, err := m.pool.Snapshots()
	if err != nil {
		return err
	}
	for _, id := range ids {
		snap, err := m.openSnapshot(id)
		if err == nil {
			err = snap.Close()
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			f.strange = append(f.strange, strange{"file " + id, m.pool.Snapshot(id), err.Error()})
		}
	}
	return nil
}

// carryOut does what an action says, if it still holds when nobody else can change it.
func (m *Manager) carryOut(a *Action, s Sweep) {
	if a.Verb == Leave {
		return
	}
	var err error
	switch find := a.find.(type) {
	case process.Process:
		var killed bool
		if killed, err = process.KillHolding(find.PID, m.templatesDir()); err == nil && !killed {
			err = errNotSo
		}
	case foundVolume:
		err = m.held(s, find.ID, func() error { return m.carryOutVolume(a.Verb, find.ID) })
	case foundReplacement:
		err = m.held(s, find.id, func() error { return m.removeReplacement(find.id) })
	case foundLoop:
		err = m.held(s, find.name, func() error { return m.detachLost(find) })
	}
	switch {
	case err == nil:
		a.Result = Done
	case errors.Is(err, errNotSo):
		a.Result = Skipped
	default:
		a.Result = err.Error()
	}
}

// errNotSo means that what the plan was made for is no longer so.
var errNotSo = errors.New("it is no longer so")

// held does something while no other operation works on a volume.
func (m *Manager) held(s Sweep, id string, do func() error) error {
	if s.Hold == nil {
		return do()
	}
	done, err := s.Hold(id)
	if err != nil {
		return errNotSo // the next sweep sees what came of it
	}
	defer done()
	return do()
}

// again looks at a volume once more.
func (m *Manager) again(id string) (foundVolume, error) {
	loops, err := m.findLoops()
	if err != nil {
		return foundVolume{}, err
	}
	table, err := readMounts()
	if err != nil {
		return foundVolume{}, err
	}
	v, err := m.findVolume(id, loops, table)
	if errors.Is(err, ErrNotFound) {
		return v, errNotSo
	}
	return v, err
}

func (m *Manager) carryOutVolume(verb Verb, id string) error {
	if verb == Thaw {
		return m.thawLeft(id)
	}
	v, err := m.again(id)
	if err != nil {
		return err
	}
	if now, _ := v.judge(); now != verb {
		return errNotSo
	}
	if verb == Delete {
		return m.unlink(id)
	}
	img, err := m.open(id)
	if err != nil {
		return err
	}
	defer img.Close()
	for _, index := range v.loops {
		if err := m.detach(img, index); err != nil {
			return err
		}
	}
	return pool.RemoveRecord(img.File, pool.StagedAttr)
}

// removeReplacement removes what was to take a volume's place. Whoever is about to put
// it there holds the volume's lock.
func (m *Manager) removeReplacement(id string) error {
	img, err := m.open(id)
	if err == nil {
		defer img.Close()
		var unlock func() error
		if unlock, err = m.exclusive(m.ctx, img, settleTime); err == nil {
			defer unlock()
		}
	}
	if errors.Is(err, ErrUnderWay) {
		return errNotSo
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	path := m.pool.Replacement(id)
	var is Record
	left, err := openImage("replacement", id, func(string) (*os.File, error) {
		return os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	}, &is)
	if errors.Is(err, ErrNotFound) {
		return errNotSo
	}
	if err != nil {
		return err
	}
	defer left.Close()
	if err := checkRecord(path, id, is.ID, is.Version); err != nil {
		return err
	}
	return tmpfile.Remove(path)
}

// detachLost detaches a device whose image was deleted, if it still is that.
func (m *Manager) detachLost(l foundLoop) error {
	loops, err := m.findLoops()
	if err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	now, here := loops[l.index]
	now.mounted = table.byLoop[l.index]
	if verb, _ := now.judge(); !here || verb != Detach || now.name != l.name {
		return errNotSo
	}
	if named, err := m.hasName(now); err != nil {
		return err
	} else if named {
		return errNotSo
	}
	return m.detach(&image{Record: Record{ID: l.name, Mode: ModeBlock}}, l.index)
}

// hasName reports whether the file behind a device is a volume of the pool.
func (m *Manager) hasName(l poolLoop) (bool, error) {
	ids, err := m.pool.Volumes()
	if err != nil {
		return false, err
	}
	for _, id := range ids {
		var st syscall.Stat_t
		if err := syscall.Lstat(m.pool.Volume(id), &st); err != nil && err != syscall.ENOENT {
			return false, &os.PathError{Op: "lstat", Path: m.pool.Volume(id), Err: err}
		} else if err == nil && st.Ino == l.inode && st.Dev == l.device {
			return true, nil
		}
	}
	return false, nil
}
