// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestBound has pods that write to a disk.img what they can. On a kernel with quotas for xfs
// the loopback pool bounds it, and its neighbours do not notice. On another one the pool works
// all the same, and the plugin reports the disk.img.
//
// TestBoundByKernel in pkg/vmformat runs this test in a VM, on a kernel that has them.
func TestBound(t *testing.T) {
	n := newBoundNode(t, pool.Config{Dir: filepath.Join(testenv.Dir(t), "pool"), LoopbackSize: gib})
	can, err := n.pool.CanBound()
	if err != nil || can != kernelHasQuota(t) {
		t.Fatalf("the pool bounds files: %v, %v", can, err)
	}
	if !can {
		n.unbounded()
		return
	}
	for name, test := range map[string]func(n *node){
		"inline": (*node).boundInline, "expanded": (*node).boundExpanded, "moved": (*node).boundMoved, "copied": (*node).boundCopied, "stale": (*node).boundStale, "taken": (*node).boundTaken,
	} {
		t.Run(name, func(t *testing.T) { test(n.with(t)) })
	}
	if guest.IsInit() {
		t.Run("administrator's", boundByAdministrator)
		t.Run("kept", boundKept)
		t.Run("failing", func(t *testing.T) { n.with(t).boundFailing() })
	}
}

// boundByAdministrator: an xfs that was mounted with prjquota by somebody else is as good. If the
// pool's directory is in a project there, nobody is taken out of that.
func boundByAdministrator(t *testing.T) {
	dir := filepath.Join(testenv.Dir(t), "pool")
	n := newBoundNode(t, pool.Config{Dir: dir})
	n.boundInline()
	volumes, err := os.Open(filepath.Join(dir, "volumes"))
	if err != nil {
		t.Fatal(err)
	}
	defer volumes.Close()
	if err := quota.SetProject(volumes, 7); err != nil {
		t.Fatal(err)
	}
	if can, err := n.pool.CanBound(); err != nil || can {
		t.Errorf("the pool bounds files: %v, %v", can, err)
	}
	r, disk := n.rawDisk("theirs", 32*mib)
	if _, project := n.usage(r.ID); project != 0 {
		t.Errorf("the disk.img is in project %d", project)
	}
	n.mustFill(disk, 150*mib)
	n.mustUnpublish(r)
}

// kernelHasQuota asks the kernel in another way than the plugin does.
func kernelHasQuota(t *testing.T) bool {
	if guest.IsInit() {
		return true
	}
	at := filepath.Join(testenv.Dir(t), "fs")
	image := testenv.Image(t, 300*mib, "mkfs.xfs", "-q")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := testenv.Try("mount", "-o", "loop,prjquota", image, at); err != nil {
		return false
	}
	testenv.Umount(t, at)
	return true
}

// newBoundNode makes a node without templates.
func newBoundNode(t *testing.T, c pool.Config) *node {
	testenv.Root(t)
	p, err := pool.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := p.Close()
		if c.LoopbackSize > 0 {
			err = errors.Join(err, syscall.Unmount(p.Root(), 0))
		}
		if err != nil {
			t.Error(err)
		}
	})
	m, err := NewManager(Config{Pool: p, TargetRoot: testenv.Dir(t)})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Manager: m, t: t, kubelet: m.root.Path("")}
	t.Cleanup(func() {
		m.Close()
		n.mustBeEmpty()
	})
	return n
}

// rawDisk publishes an inline disk.img without a template, and returns its path.
func (n *node) rawDisk(id string, bytes int64) (InlineRequest, string) {
	n.t.Helper()
	r := n.request(id, "raw", bytes)
	r.Mode = image.ModeDiskImage
	n.mustPublish(r)
	return r, filepath.Join(r.Target, image.DiskName)
}

// rawClaim publishes a claim that is a disk.img, and returns its path.
func (n *node) rawClaim(name string, bytes int64) (image.Record, string) {
	n.t.Helper()
	v := n.mustCreate(ClaimRequest{Name: name, Spec: diskfs.Spec{Filesystem: "raw", Size: bytes}, Mode: image.ModeDiskImage})
	return v, filepath.Join(n.mustPublishClaim(v, "pod"), image.DiskName)
}

// fill writes to a file from its begin, and returns how many bytes there was space for.
func fill(path string, most int64) (int64, error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	piece := bytes.Repeat([]byte("data"), mib/4)
	for at := int64(0); at < most; at += mib {
		if _, err := f.WriteAt(piece, at); err != nil {
			return at, errors.Join(err, f.Sync())
		}
	}
	return most, f.Sync()
}

// mustFill writes a file that has a bound no lower.
func (n *node) mustFill(path string, bytes int64) {
	n.t.Helper()
	if wrote, err := fill(path, bytes); err != nil {
		n.t.Errorf("%s: after %s of %s: %v", path, size.Format(wrote), size.Format(bytes), err)
	}
}

// mustEndAt writes a file until it cannot grow, which must be just below its bound.
func (n *node) mustEndAt(path string, bound int64) {
	n.t.Helper()
	wrote, err := fill(path, 900*mib)
	if !errors.Is(err, syscall.ENOSPC) || wrote > bound || wrote < bound-4*mib {
		n.t.Errorf("%s: after %s, with a bound of %s: %v", path, size.Format(wrote), size.Format(bound), err)
	}
}

// usage returns what the project of a volume's image takes, and its number.
func (n *node) usage(id string) (quota.Usage, uint32) {
	n.t.Helper()
	img, err := n.images.Open(id)
	if err != nil {
		n.t.Fatal(err)
	}
	defer img.Close()
	project, err := quota.Project(img.File)
	if err != nil {
		n.t.Fatal(err)
	}
	u, err := quota.Get(img.File, project)
	if err != nil {
		n.t.Fatal(err)
	}
	return u, project
}

func (n *node) mustForget(project uint32) {
	n.t.Helper()
	testenv.Eventually(n.t, fmt.Sprintf("project %d to end", project), func() bool {
		dir, err := os.Open(n.pool.Root())
		if err != nil {
			n.t.Fatal(err)
		}
		defer dir.Close()
		u, err := quota.Get(dir, project)
		return err == nil && u == quota.Usage{}
	})
}

// unbounded: nothing stops the pod, and the plugin reports it until it has gone.
func (n *node) unbounded() {
	t := n.t
	r, disk := n.rawDisk("large", 32*mib)
	v, claim := n.rawClaim("reserved", 16*mib)
	small, _ := n.rawDisk("small", 32*mib)
	mustFind := func(want ...string) {
		t.Helper()
		if err := n.CheckDisks(t.Context()); err != nil {
			t.Error(err)
		}
		found := n.DiskHealth()
		var objects []string
		for _, c := range found {
			objects = append(objects, c.Object)
			if c.Code != health.DiskImageGrown || !c.StillReady {
				t.Errorf("found %+v", c)
			}
		}
		if fmt.Sprint(objects) != fmt.Sprint(want) {
			t.Errorf("found %v, want %v", found, want)
		}
	}
	n.mustFill(claim, 16*mib)
	mustFind()
	n.mustFill(disk, 300*mib)
	f, err := os.OpenFile(claim, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Fallocate(int(f.Fd()), 1 /* KEEP_SIZE */, 16*mib, 100*mib); err != nil {
		t.Error(err)
	}
	f.Close()
	mustFind(r.ID, v.ID)
	if err := os.Truncate(claim, 16*mib); err != nil {
		t.Error(err)
	}
	mustFind(r.ID)
	n.mustUnpublish(r)
	n.mustUnpublish(small)
	mustFind()
	n.mustEnd(v, "pod")
}

// boundInline: a pod cannot take more than its bound, and its neighbours have their space.
func (n *node) boundInline() {
	neighbour, theirs := n.rawClaim("neighbour", 200*mib)
	r, disk := n.rawDisk("inline", 32*mib)
	n.mustFill(disk, 32*mib)
	n.mustEndAt(disk, 32*mib+image.Slack(32*mib))
	n.mustFill(theirs, 200*mib)
	u, project := n.usage(r.ID)
	if most := 32*mib + image.Slack(32*mib); u.Files != 1 || u.Bytes > u.Limit || u.Limit < most || u.Limit > most+64*size.KiB { // the record takes a block
		n.t.Errorf("the project has %+v", u)
	}
	n.mustPublish(r) // changes nothing
	if again, _ := n.usage(r.ID); again != u {
		n.t.Errorf("published again, it has %+v, not %+v", again, u)
	}
	n.mustUnpublish(r)
	n.mustForget(project)
	n.mustEnd(neighbour, "pod")
}

// boundExpanded: the bound grows with the claim, while it is in use.
func (n *node) boundExpanded() {
	v, disk := n.rawClaim("expanded", 16*mib)
	n.mustEndAt(disk, 32*mib+image.Slack(16*mib))
	if _, _, err := n.Expand(v.ID, Size{Required: 128 * mib}, nil); err != nil {
		n.t.Fatal(err)
	}
	n.mustFill(disk, 128*mib)
	n.mustEndAt(disk, 256*mib+image.Slack(128*mib))
	_, project := n.usage(v.ID)
	n.mustEnd(v, "pod")
	n.mustForget(project)
}

// boundMoved: root in a pod can take its file out of the project, and the plugin puts it back. Who
// does not own the file cannot, and neither can who is in a user namespace.
func (n *node) boundMoved() {
	t := n.t
	r, disk := n.rawDisk("moved", 32*mib)
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	testenv.OnThread(func() {
		if err := syscall.Setfsuid(1000); err != nil {
			t.Error(err)
		}
		if err := quota.SetProject(f, 0); !errors.Is(err, syscall.EPERM) {
			t.Errorf("another user moved it: %v", err)
		}
	})
	if out, err := moveInUserNamespace(f); err == nil || !strings.Contains(out, "invalid argument") {
		t.Errorf("root of a user namespace moved it: %v, %s", err, out)
	}
	if err := quota.SetProject(f, 0); err != nil {
		t.Fatal(err)
	}
	n.mustFill(disk, 150*mib)
	if err := n.CheckDisks(t.Context()); err != nil {
		t.Error(err)
	}
	if h := n.DiskHealth(); len(h) != 1 || h[0].Object != r.ID {
		t.Errorf("found %v", h)
	}
	if _, err := f.WriteAt(make([]byte, mib), 200*mib); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("beyond its bound: %v", err)
	}
	f.Close()
	_, project := n.usage(r.ID)
	n.mustUnpublish(r)
	n.mustForget(project)
}

// scatter writes pieces of 4 KiB all over a file, as a VM does: with direct I/O, several at once.
// The filesystem then keeps more blocks for itself than it is given data.
func scatter(path string, bytes int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE) // aligned
	if err != nil {
		return err
	}
	defer unix.Munmap(page)
	const writers = 8
	var g errgroup.Group
	for w := range int64(writers) {
		g.Go(func() error {
			for at := w * 128 * size.KiB; at < bytes; at += writers * 128 * size.KiB {
				if _, err := f.WriteAt(page, at); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// moverEnv makes this program move the file that it inherits out of its project.
const moverEnv = "CSI_DISKTEMPLATE_TEST_MOVER"

// moveInUserNamespace tries that as the root of a user namespace, who owns the file.
func moveInUserNamespace(f *os.File) (string, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), moverEnv+"=1")
	cmd.ExtraFiles = []*os.File{f}
	self := []syscall.SysProcIDMap{{Size: 1}} // 0 is 0
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: self, GidMappings: self}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// boundCopied: what shares all its blocks with a snapshot can be overwritten. Copies are in no
// project until they are published.
func (n *node) boundCopied() {
	t := n.t
	v, disk := n.rawClaim("copied", 100*mib)
	n.mustFill(disk, 100*mib)
	snap := n.mustSnapshot("snap", v.ID)
	if err := scatter(disk, 100*mib); err != nil {
		t.Error(err)
	}
	n.mustFill(disk, 100*mib)
	if err := n.CheckDisks(t.Context()); err != nil || len(n.DiskHealth()) > 0 {
		t.Errorf("found %v, %v", n.DiskHealth(), err)
	}
	s, err := n.images.OpenSnapshot(snap.ID)
	if err != nil {
		t.Fatal(err)
	}
	if project, err := quota.Project(s.File); err != nil || project != 0 {
		t.Errorf("the snapshot is in project %d: %v", project, err)
	}
	s.Close()
	clone := n.mustCreate(ClaimRequest{
		Name: "clone", Spec: v.Spec, Mode: v.Mode, Source: image.Source{Snapshot: snap.ID},
	})
	if _, project := n.usage(clone.ID); project != 0 {
		t.Errorf("the clone is in project %d", project)
	}
	at := filepath.Join(n.mustPublishClaim(clone, "pod"), image.DiskName)
	n.mustFill(at, 100*mib)
	n.mustEndAt(at, 200*mib+image.Slack(100*mib))
	n.mustEnd(clone, "pod")
	n.mustEnd(v, "pod")
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		t.Error(err)
	}
}

// boundStale: a limit that a crash left for the same inode is replaced.
func (n *node) boundStale() {
	r, _ := n.rawDisk("stale", 32*mib)
	_, project := n.usage(r.ID)
	n.mustUnpublish(r)
	dir, err := os.Open(n.pool.Root())
	if err != nil {
		n.t.Fatal(err)
	}
	defer dir.Close()
	for id := project - 64; id < project+64; id++ { // the inode's neighbours too
		if err := quota.SetLimit(dir, id, mib); err != nil {
			n.t.Fatal(err)
		}
		defer quota.SetLimit(dir, id, 0)
	}
	r, disk := n.rawDisk("stale", 32*mib)
	n.mustEndAt(disk, 32*mib+image.Slack(32*mib))
	n.mustUnpublish(r)
}

// boundTaken: a file of somebody else is in the project that an image would get. Neither is touched,
// and the image gets its bound when the project is free.
func (n *node) boundTaken() {
	t := n.t
	v := n.mustCreate(ClaimRequest{Name: "taken", Spec: diskfs.Spec{Filesystem: "raw", Size: 16 * mib}, Mode: image.ModeDiskImage})
	fi, err := os.Stat(n.pool.Volume(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.Create(filepath.Join(n.pool.CacheDir(), "theirs"))
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	project := uint32(1<<31 + fi.Sys().(*syscall.Stat_t).Ino)
	if err := quota.SetProject(theirs, project); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(n.mustPublishClaim(v, "pod"), image.DiskName)
	if _, _, err := n.Expand(v.ID, Size{Required: 32 * mib}, nil); err != nil {
		t.Error(err)
	}
	if err := n.CheckDisks(t.Context()); err != nil {
		t.Error(err)
	}
	if _, its := n.usage(v.ID); its != 0 {
		t.Errorf("the image is in project %d", its)
	}
	if u, err := quota.Get(theirs, project); err != nil || u.Limit != 0 || u.Files != 1 {
		t.Errorf("the other project has %+v: %v", u, err)
	}
	n.mustFill(disk, 150*mib)
	if err := errors.Join(os.Truncate(disk, 32*mib), quota.SetProject(theirs, 0), os.Remove(theirs.Name()), n.CheckDisks(t.Context())); err != nil {
		t.Error(err)
	}
	n.mustEndAt(disk, 64*mib+image.Slack(32*mib))
	n.mustEnd(v, "pod")
	n.mustForget(project)
}

// boundKept: a loopback pool that volumes have kept mounted since an older plugin has no quotas. It is
// used as it is, until nothing has it mounted any more.
func boundKept(t *testing.T) {
	c := pool.Config{Dir: filepath.Join(testenv.Dir(t), "pool"), LoopbackSize: gib}
	open := func() *pool.Pool {
		t.Helper()
		p, err := pool.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		return p
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	root := open().Root()
	must(syscall.Unmount(root, 0))
	testenv.NoLoopsBelow(t, c.Dir)
	file, err := os.OpenFile(filepath.Join(c.Dir, "pool.img"), os.O_RDWR, 0)
	must(err)
	dev, err := new(loopdev.Allocator).Attach(file, loopdev.Options{AutoClear: true, Name: "pool.img"})
	must(err)
	old, err := mount.New(mount.Config{FSType: "xfs", Source: dev.Path()})
	must(errors.Join(err, dev.Close(), file.Close()))
	p, err := pool.Open(t.Context(), c)
	must(err)
	if can, err := p.CanBound(); err != nil || can {
		t.Errorf("kept mounted, the pool bounds files: %v, %v", can, err)
	}
	must(errors.Join(p.Close(), old.Close(), syscall.Unmount(root, 0)))
	testenv.NoLoopsBelow(t, c.Dir)
	newBoundNode(t, c).boundInline()
}

// boundFailing makes each effect of publishing and of expanding fail, one after the other. The same
// call, made again, then succeeds, and the image has the bound of its size.
func (n *node) boundFailing() {
	dir := testenv.Dir(n.t)
	n.t.Setenv(failpoint.Env, dir)
	plans := 0
	// failEach makes a call until none of its effects is left to fail, and returns all of them.
	failEach := func(call func() error, again func()) (effects []string) {
		for at := 1; ; at++ {
			plans++
			plan := filepath.Join(dir, failpoint.PlanFile)
			if err := os.WriteFile(plan, fmt.Appendf(nil, "%d %d EIO", plans, at), 0o600); err != nil {
				n.t.Fatal(err)
			}
			err := call() // some effects may fail
			b, e := os.ReadFile(filepath.Join(dir, fmt.Sprint(failpoint.TraceFile, plans)))
			if e = errors.Join(e, os.Remove(plan)); e != nil {
				n.t.Fatal(e)
			}
			effects = strings.Split(strings.TrimSpace(string(b)), "\n")
			if again(); len(effects) < at || n.t.Failed() {
				if err != nil {
					n.t.Error(err)
				}
				return effects
			}
		}
	}
	v, _ := n.rawClaim("failing", 16*mib)
	n.mustUnpublishClaim(v, "pod")
	bytes := v.Spec.Size
	mustBeBound := func() {
		n.mustPublishClaim(v, "pod")
		if u, _ := n.usage(v.ID); u.Limit != 2*bytes+image.Slack(bytes)/512*512 {
			n.t.Errorf("%s have the bound %s", size.Format(bytes), size.Format(u.Limit))
		}
		n.mustUnpublishClaim(v, "pod")
	}
	unbind := func() { // as an image is before its first publish
		img, err := n.images.Open(v.ID)
		if err != nil {
			n.t.Fatal(err)
		}
		defer img.Close()
		_, project := n.usage(v.ID)
		if err := errors.Join(quota.SetProject(img.File, 0), quota.SetLimit(img.File, project, 0)); err != nil {
			n.t.Fatal(err)
		}
	}
	unbind()
	published := failEach(func() error { return n.PublishClaim(n.t.Context(), n.publishRequest(v, "pod")) }, func() {
		mustBeBound()
		unbind()
	})
	expanded := failEach(func() error {
		_, _, err := n.Expand(v.ID, Size{Required: bytes + mib}, nil)
		return err
	}, func() {
		if _, _, err := n.Expand(v.ID, Size{Required: bytes + mib}, nil); err != nil {
			n.t.Error(err)
		}
		bytes += mib
		mustBeBound()
	})
	for _, effects := range [][]string{published, expanded} {
		if !slices.Contains(effects, "quotactl_fd") {
			n.t.Errorf("the effects are %q", effects)
		}
		n.t.Logf("failed: %q", effects)
	}
	n.mustDelete(v.ID)
}

// BenchmarkCheckDisks looks at 100 volumes that are disk.img.
func BenchmarkCheckDisks(b *testing.B) {
	n := newNode(b, testenv.XFS, gib)
	for i := range 100 {
		v := n.mustCreate(ClaimRequest{Name: fmt.Sprint("disk-", i), Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage})
		defer n.mustDelete(v.ID)
	}
	for b.Loop() {
		if err := n.CheckDisks(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
