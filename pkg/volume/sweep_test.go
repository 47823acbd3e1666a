// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// mustSweep sweeps, and checks the actions. Each is given as "verb object".
func (n *node) mustSweep(s sweep.Options, want ...string) []sweep.Action {
	n.t.Helper()
	actions, err := n.Sweep(n.t.Context(), s)
	if err != nil {
		n.t.Fatal(err)
	}
	var got []string
	for _, a := range actions {
		n.t.Logf("%+v", a)
		got = append(got, string(a.Verb)+" "+a.Object)
		if a.Failed() || (a.Result == "") != (s.DryRun || a.Verb == sweep.Leave) {
			n.t.Errorf("%s %s: %q", a.Verb, a.Object, a.Result)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		n.t.Errorf("sweep: %q, expected %q", got, want)
	}
	return actions
}

// endPod removes a pod's directory, as kubelet does when it is done with the pod.
func (n *node) endPod(id string) {
	n.t.Helper()
	if err := os.RemoveAll(filepath.Join(n.kubelet, "pods", id)); err != nil {
		n.t.Fatal(err)
	}
}

// TestSweepInline checks that an inline volume is deleted once its pod is gone for good, and
// not before.
func TestSweepInline(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			for _, mode := range image.MountModes {
				r := n.request("v-"+strings.ToLower(string(mode)), "ext4", 64*mib)
				r.Mode = mode
				n.mustPublish(r)
				n.mustSweep(sweep.Options{First: true})
				// After a reboot nothing is mounted, and the pod will come back.
				testenv.Run(t, "umount", "--recursive", r.Target)
				testenv.NoLoopsBelow(t, n.pool.Root())
				n.mustSweep(sweep.Options{First: true})
				if res := n.mustPublish(r); !res.Existed {
					t.Error("a sweep deleted the volume of a pod that came back")
				}
				// The pod is deleted while no plugin runs, and kubelet forgets it.
				testenv.Run(t, "umount", "--recursive", r.Target)
				testenv.NoLoopsBelow(t, n.pool.Root())
				n.endPod(r.ID)
				n.mustSweep(sweep.Options{DryRun: true}, "delete volume "+r.ID)
				if _, err := os.Stat(n.pool.Volume(r.ID)); err != nil {
					t.Errorf("a dry run deleted it: %v", err)
				}
				// A sweep skips a volume that another operation works on.
				unlock, err := n.locks.volume(r.ID)
				if err != nil {
					t.Fatal(err)
				}
				if a, err := n.Sweep(t.Context(), sweep.Options{}); err != nil || len(a) != 1 || a[0].Result != sweep.Skipped {
					t.Errorf("%+v %v", a, err)
				}
				unlock()
				n.mustSweep(sweep.Options{}, "delete volume "+r.ID)
				n.mustSweep(sweep.Options{})
				n.mustBeEmpty()
			}
		})
	}
}

// TestSweepWaits checks that a volume stays as long as something uses it, and is deleted
// afterwards.
func TestSweepWaits(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	r := n.request("waits", "ext4", 64*mib)
	n.mustPublish(r)
	elsewhere := testenv.Dir(t)
	testenv.Run(t, "mount", "--bind", r.Target, elsewhere)
	testenv.Run(t, "umount", r.Target)
	n.endPod(r.ID)
	n.mustSweep(sweep.Options{}, "leave volume waits")
	hold, err := os.Open(filepath.Join(elsewhere, "lost+found"))
	if err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "umount", "--lazy", elsewhere)
	n.mustSweep(sweep.Options{}, "leave volume waits")
	hold.Close()
	testenv.NoLoopsBelow(t, n.pool.Root())
	n.mustSweep(sweep.Options{}, "delete volume waits")
}

// TestSweepBlock checks that a block volume's device is detached if its staging directory
// vanished without a NodeUnstageVolume call. The volume stays.
func TestSweepBlock(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			v := n.mustCreate(disk("block", 64*mib))
			n.mustPublishClaim(v, "pod")
			n.mustSweep(sweep.Options{})
			n.mustUnpublishClaim(v, "pod")
			n.mustSweep(sweep.Options{})
			if err := os.RemoveAll(filepath.Join(n.kubelet, "plugins", v.ID)); err != nil {
				t.Fatal(err)
			}
			n.mustSweep(sweep.Options{}, "detach volume block")
			testenv.NoLoopsBelow(t, n.pool.Root())
			n.mustSweep(sweep.Options{})
			n.mustDelete(v.ID)

			// Its image is deleted while it is staged.
			v = n.mustCreate(disk("lost", 64*mib))
			n.mustPublishClaim(v, "pod")
			if err := os.Remove(n.pool.Volume(v.ID)); err != nil {
				t.Fatal(err)
			}
			loop := testenv.LoopsBelow(t, n.pool.Root())[0]
			n.mustSweep(sweep.Options{}, "leave /dev/"+loop)
			n.mustUnpublishClaim(v, "pod")
			n.mustSweep(sweep.Options{}, "detach /dev/"+loop)
			n.mustSweep(sweep.Options{})
		})
	}
}

// TestSweepThaws checks that a sweep thaws a filesystem that a dead plugin froze, and leaves
// one alone that somebody else froze.
func TestSweepThaws(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("frozen", "ext4", 64*mib))
	at := n.mustStage(v)
	root, err := os.Open(at)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	img, err := n.images.Open(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if err := fsctl.Freeze(root); err != nil {
		t.Fatal(err)
	}
	_, err = n.CreateSnapshot(t.Context(), "of-frozen", v.ID)
	t.Log(err)
	if !errors.Is(err, errdefs.ErrState) || !errors.Is(err, fsctl.ErrFrozen) {
		t.Errorf("a snapshot of a volume that somebody else froze: %v", err)
	}
	n.mustSweep(sweep.Options{First: true})
	if err := fsctl.Freeze(root); !errors.Is(err, fsctl.ErrFrozen) {
		t.Errorf("the sweep ended somebody else's freeze: %v", err)
	}
	if err := pool.SetRecord(img.File, pool.FrozenAttr, time.Now()); err != nil {
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{First: true}, "thaw volume frozen")
	if err := os.WriteFile(filepath.Join(at, "file"), nil, 0o600); err != nil {
		t.Error(err)
	}
	n.mustSweep(sweep.Options{First: true})
	root.Close()
	img.Close()
	n.mustEnd(v)
}

// TestSweepReplacement checks that a file that was to replace a volume's image is deleted,
// unless a living process is about to replace it.
func TestSweepReplacement(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("grows", "ext4", 64*mib))
	left := n.pool.Replacement(v.ID)
	f, err := os.Create(left)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if l, _, err := n.ListClaims("", 0); err != nil || len(l) != 1 {
		t.Errorf("claims %v: %v", l, err)
	}
	img, err := n.images.Open(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	// A replacement without a record is somebody else's.
	if a, err := n.Sweep(t.Context(), sweep.Options{}); err != nil || len(a) != 1 || !a[0].Failed() || !strings.Contains(a[0].Result, "not one of ours") {
		t.Errorf("%+v %v", a, err)
	}
	if err := pool.SetRecord(f, pool.VolumeAttr, img.Record); err != nil {
		t.Fatal(err)
	}
	unlock, err := n.images.Exclusive(t.Context(), img, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := n.Sweep(t.Context(), sweep.Options{}); err != nil || len(a) != 1 || a[0].Result != sweep.Skipped {
		t.Errorf("%+v %v", a, err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{}, "delete replacement of volume grows")
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of a process that died is still there: %v", err)
	}
	n.mustDelete(v.ID)
}

// TestSweepSparesOthers has things that look like the plugin's and are not, and things of
// the plugin for which nothing can be proven. A sweep touches none of them.
func TestSweepSparesOthers(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	fs := filepath.Dir(n.pool.Root())
	// A neighbour has a pool on the same filesystem, and the same kubelet.
	neighbour, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(fs, "neighbour")})
	if err != nil {
		t.Fatal(err)
	}
	defer neighbour.Close()
	other, err := NewManager(Config{Pool: neighbour, Templates: n.contents.templates, TargetRoot: n.kubelet})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	theirs := &node{other, t, n.kubelet}
	block := theirs.mustCreate(disk("block", 64*mib))
	theirs.mustStage(block)
	images := theirs.request("images", "ext4", 64*mib)
	images.Mode, images.Spec.Filesystem = image.ModeDiskImage, "raw"
	theirs.mustPublish(images)

	// Users have loop devices on the pool's filesystem, mounts below the kubelet's
	// directory, directories with names like ours.
	own := filepath.Join(fs, "volumes", "disk.img")
	inPool := n.pool.Volume("disk.img")
	for _, path := range []string{own, inPool} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600), os.Truncate(path, 64*mib)); err != nil {
			t.Fatal(err)
		}
	}
	loop := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", own))
	defer testenv.Run(t, "losetup", "--detach", loop)
	f, err := os.OpenFile(inPool, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := new(loopdev.Allocator).Attach(f, loopdev.Options{Name: "/rescue.img"}) // losetup names a device by a path
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	deleted := dev.Path()
	dev.Close()
	defer testenv.Run(t, "losetup", "--detach", deleted)
	if err := os.Remove(inPool); err != nil { // it was in the directory of volumes, but was not a volume
		t.Fatal(err)
	}
	driver := filepath.Join(n.target("driver"), "x")
	if err := os.MkdirAll(driver, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "-t", "tmpfs", "csi-other:images", driver)
	defer testenv.Run(t, "umount", driver)

	// The pool has files that make no sense to the plugin.
	if err := errors.Join(
		os.WriteFile(n.pool.Volume("notes.txt"), []byte("mine"), 0o600),
		os.Mkdir(n.pool.Volume("directory"), 0o700),
		os.WriteFile(n.pool.Snapshot("notes.txt"), []byte("mine"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	newer := n.mustCreate(disk("newer", 64*mib))
	img, err := n.images.Open(newer.ID)
	if err != nil {
		t.Fatal(err)
	}
	img.Record.Version = 4
	if err := pool.SetRecord(img.File, pool.VolumeAttr, img.Record); err != nil {
		t.Fatal(err)
	}
	img.Close()
	// Nobody can tell whose this inline volume was.
	r := n.request("elsewhere", "ext4", 64*mib)
	n.mustPublish(r)
	testenv.Run(t, "umount", r.Target)
	testenv.NoLoopsBelow(t, filepath.Join(n.pool.Root(), "volumes", "none"))
	setTarget := func(target string) {
		t.Helper()
		img, err := n.images.Open(r.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		img.Record.Target = target
		if err := pool.SetRecord(img.File, pool.VolumeAttr, img.Record); err != nil {
			t.Fatal(err)
		}
	}
	strange := []string{
		"leave file notes.txt", "leave file notes.txt", "leave file directory", "leave file newer",
	}
	// If another container orchestrator published the volume, nothing can be proven.
	for _, target := range []string{"/elsewhere/pods/u/volumes/v/mount", filepath.Join(n.kubelet, "nomad", "alloc", "mount")} {
		setTarget(target)
		n.mustSweep(sweep.Options{First: true}, append(strange, "leave volume elsewhere")...)
	}
	// A directory without the directories of pods is not a kubelet's.
	setTarget(r.Target)
	pods := filepath.Join(n.kubelet, "pods")
	before, err := os.Stat(n.pool.Volume(r.ID))
	if err != nil {
		t.Fatal(err)
	}
	empty := testenv.Dir(t)
	if err := os.Mkdir(filepath.Join(empty, "pods"), 0o700); err != nil { // or it is a kubelet's whose disk is not mounted yet
		t.Fatal(err)
	}
	for _, dir := range []string{testenv.Dir(t), empty} {
		blank, err := NewManager(Config{Pool: n.pool, TargetRoot: dir})
		if err != nil {
			t.Fatal(err)
		}
		setTarget(filepath.Join(dir, "pods", "uid", "volumes", "mount"))
		(&node{blank, t, ""}).mustSweep(sweep.Options{First: true}, append(strange, "leave volume elsewhere")...)
		blank.Close()
	}
	setTarget(r.Target)
	if after, err := os.Stat(n.pool.Volume(r.ID)); err != nil || !os.SameFile(before, after) {
		t.Errorf("the volume: %v", err)
	}
	n.mustSweep(sweep.Options{First: true}, strange...)

	for _, left := range []string{loop, deleted} {
		if out, err := testenv.Try("losetup", left); err != nil {
			t.Errorf("%s: %v %s", left, err, out)
		}
	}
	if len(theirs.loops(block.ID)) != 1 || testenv.Mounts(t, filepath.Dir(images.Target)) != 2 {
		t.Error("the neighbour lost something")
	}
	theirs.mustUnpublish(images)
	theirs.mustUnstage(block.ID)
	theirs.mustDelete(block.ID)
	n.mustUnpublish(r)
	if entries, err := os.ReadDir(pods); err != nil || len(entries) == 0 {
		t.Errorf("the pods' directories: %v %v", entries, err)
	}
	for _, path := range []string{n.pool.Volume("notes.txt"), n.pool.Volume("directory"), n.pool.Snapshot("notes.txt"), n.pool.Volume(newer.ID)} {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// TestSweepKillsVM checks that the next plugin that starts kills a VM that formats for a dead
// one, and kills no other process that has files of the pool open.
func TestSweepKillsVM(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	image, err := n.pool.NewTemplate()
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	named, err := n.pool.NewTemplate()
	if err != nil {
		t.Fatal(err)
	}
	defer named.Close()
	const name = "ext4-64m-000000000000000a"
	if err := tmpfile.Link(named, n.pool.Template(name)); err != nil {
		t.Fatal(err)
	}
	reopened, err := os.Open(n.pool.Template(name))
	if err != nil {
		t.Fatal(err)
	}
	defer reopened.Close()
	sleep := func(f *os.File) *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		cmd.ExtraFiles = []*os.File{f}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		return cmd
	}
	orphan, reader := sleep(image), sleep(reopened)
	image.Close()
	if err := os.Remove(n.pool.Template(name)); err != nil { // as trimming does
		t.Fatal(err)
	}
	n.mustSweep(sweep.Options{}) // later sweeps spare it: it may be this plugin's own VM
	n.mustSweep(sweep.Options{First: true}, fmt.Sprintf("kill process %d", orphan.Process.Pid))
	if err := orphan.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the orphan ended with %v", err)
	}
	n.mustSweep(sweep.Options{First: true})
	if err := reader.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the reader: %v", err)
	}
}
