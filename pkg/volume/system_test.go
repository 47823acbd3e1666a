// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/growfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// node is the node of a test: a Manager with its pool, and kubelet's directory.
type node struct {
	*Manager
	t       testing.TB
	kubelet string
}

// newNode makes a node whose pool is on a filesystem of its own. The test must leave it
// without volumes, loop devices and mounts.
func newNode(t testing.TB, kind testenv.Kind, size int64) *node {
	t.Helper()
	return newNodeWith(t, kind, size, Config{})
}

// newNodeWith makes a node with a given configuration. It sets the pool, the templates and
// kubelet's directory itself.
func newNodeWith(t testing.TB, kind testenv.Kind, size int64, c Config) *node {
	t.Helper()
	p, err := pool.Open(t.Context(), pool.Config{Dir: filepath.Join(kind.Mount(t, size), "pool")})
	if err != nil {
		t.Fatal(err)
	}
	return newNodeOn(t, p, c)
}

// newNodeOn makes a node on a pool.
func newNodeOn(t testing.TB, p *pool.Pool, c Config) *node {
	t.Helper()
	t.Cleanup(func() { p.Close() })
	formatter, err := vmformat.New(vmformat.Config{Init: testenv.Binary(t), CacheDir: testenv.CacheDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	store := template.NewStore(template.Config{
		Pool:        p,
		Fingerprint: func(spec diskfs.Spec) (string, error) { return formatter.Fingerprint(spec, nil) },
		Format: func(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
			return formatOnce(ctx, formatter, f, spec)
		},
	})
	t.Cleanup(store.Close)
	kubelet := testenv.Dir(t)
	c.Pool, c.Templates, c.TargetRoot, c.GrowFilesystem = p, store, kubelet, growfs.Grow
	m, err := NewManager(c)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Manager: m, t: t, kubelet: kubelet}
	n.target("plugin") // the plugin runs in a pod, too
	t.Cleanup(func() { testenv.Sweep(t, n.kubelet, n.pool.Root()) })
	t.Cleanup(func() {
		m.Close()
		n.mustBeEmpty()
	})
	return n
}

// newImage makes the image of an inline volume, without a name.
func (n *node) newImage(r InlineRequest) (*image.Image, error) {
	vol, _, err := n.contents.newImage(n.t.Context(), r.record(), nil)
	return vol.img, err
}

// formatted are the disks that a VM has made for this process. Every test has a pool of its
// own, but need not wait for a VM to make the same disk once more.
var formatted = struct {
	sync.Mutex
	disks map[string]formattedDisk
}{disks: map[string]formattedDisk{}}

type formattedDisk struct {
	file *os.File // without a name
	template.Provenance
}

func formatOnce(ctx context.Context, formatter *vmformat.Formatter, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
	formatted.Lock()
	defer formatted.Unlock()
	if d, ok := formatted.disks[spec.String()]; ok {
		return d.Provenance, errors.Join(f.Truncate(spec.Size), sparse.Copy(ctx, f, d.file))
	}
	r, err := formatter.Format(ctx, f, spec, nil, nil)
	if err != nil {
		return template.Provenance{}, err
	}
	d := formattedDisk{Provenance: template.Provenance{Fingerprint: r.Fingerprint, UUID: r.UUID}}
	if d.file, err = tmpfile.Create("/var/tmp", 0o600); err != nil {
		return template.Provenance{}, err
	}
	formatted.disks[spec.String()] = d
	return d.Provenance, sparse.Copy(ctx, d.file, f)
}

// mustBeEmpty checks that the node has no images, loop devices and mounts.
func (n *node) mustBeEmpty() {
	n.t.Helper()
	for _, list := range []func() ([]string, error){n.pool.Volumes, n.pool.Snapshots} {
		if names, err := list(); err != nil || len(names) > 0 {
			n.t.Errorf("images left: %v %v", names, err)
		}
	}
	testenv.NoLoopsBelow(n.t, n.pool.Root())
	if c := testenv.Mounts(n.t, n.kubelet); c > 0 {
		n.t.Errorf("%d mounts left", c)
	}
}

// target makes the parent of a target path, as kubelet does.
func (n *node) target(id string) string {
	n.t.Helper()
	dir := filepath.Join(n.kubelet, "pods", id, "volumes")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(dir, "mount")
}

func (n *node) request(id, filesystem string, size int64) InlineRequest {
	return InlineRequest{
		ID: id, Target: n.target(id), Mode: image.ModeFilesystem,
		Spec: diskfs.Spec{Filesystem: filesystem, Size: size},
		Pod:  image.Pod{Namespace: "default", Name: "pod-" + id},
	}
}

func (n *node) mustPublish(r InlineRequest) Result {
	n.t.Helper()
	res, err := n.PublishInline(n.t.Context(), r)
	if err != nil {
		n.t.Fatal(err)
	}
	return res
}

func (n *node) mustUnpublish(r InlineRequest) {
	n.t.Helper()
	if err := n.Unpublish(r.ID, r.Target); err != nil {
		n.t.Error(err)
	}
	if _, err := os.Lstat(r.Target); !errors.Is(err, os.ErrNotExist) {
		n.t.Errorf("target %s is still there: %v", r.Target, err)
	}
}

func findmnt(t testing.TB, column, target string) string {
	t.Helper()
	return strings.TrimSpace(testenv.Run(t, "findmnt", "-n", "-o", column, "--mountpoint", target))
}

// TestClones mounts four clones of each template at once and checks everything
// about them, for every filesystem, size and kind of pool.
func TestClones(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 2<<30)
			for _, fs := range diskfs.Names() {
				for _, size := range []int64{300 << 20, 1 << 30, 100 << 30} {
					t.Run(fmt.Sprintf("%s-%dMiB", fs, size>>20), func(t *testing.T) {
						n := &node{n.Manager, t, n.kubelet}
						n.fourClones(fs, size)
					})
				}
			}
		})
	}
}

func (n *node) fourClones(fs string, size int64) {
	t := n.t
	uuids := map[string]bool{}
	var requests []InlineRequest
	var key string
	for i := range 4 {
		r := n.request(fmt.Sprintf("%s-%d-%d", fs, size>>20, i), fs, size)
		r.Spec.Label = "lbl"
		res := n.mustPublish(r)
		if res.TemplateHit != (i > 0) {
			t.Errorf("volume %d: template hit %v", i, res.TemplateHit)
		}
		key = res.Template
		requests = append(requests, r)
	}
	for i, r := range requests {
		if got := findmnt(t, "FSTYPE", r.Target); got != fs {
			t.Errorf("mounted as %q", got)
		}
		uuids[findmnt(t, "UUID", r.Target)] = true
		if got := findmnt(t, "LABEL", r.Target); got != "lbl" {
			t.Errorf("label %q", got)
		}
		for _, option := range []string{"nosuid", "nodev"} {
			if got := findmnt(t, "VFS-OPTIONS", r.Target); !strings.Contains(got, option) {
				t.Errorf("options %q lack %s", got, option)
			}
		}
		sys := filepath.Join("/sys/block", filepath.Base(findmnt(t, "SOURCE", r.Target)))
		for file, want := range map[string]string{"loop/dio": "1", "loop/autoclear": "1", "queue/logical_block_size": "4096"} {
			if b, err := os.ReadFile(filepath.Join(sys, file)); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s/%s is %q (%v), not %s", sys, file, b, err, want)
			}
		}
		if err := os.WriteFile(filepath.Join(r.Target, "file"), fmt.Append(nil, i), 0o644); err != nil {
			t.Error(err)
		}
		u, err := n.Stats(r.ID, r.Target)
		if err != nil || u.TotalBytes < size*7/10 || u.TotalBytes > size || u.AvailableBytes > u.TotalBytes {
			t.Errorf("stats %+v of %d bytes: %v", u, size, err)
		}
	}
	if len(uuids) != 4 {
		t.Errorf("four clones have the UUIDs %v", uuids)
	}
	for i, r := range requests {
		if b, err := os.ReadFile(filepath.Join(r.Target, "file")); err != nil || string(b) != fmt.Sprint(i) {
			t.Errorf("volume %d has %q: %v", i, b, err)
		}
		// The checkers need it unmounted, and Unpublish must cope with that.
		testenv.Umount(t, r.Target)
		testenv.Fsck(t, fs, n.pool.Volume(r.ID))
		n.mustUnpublish(r)
	}
	testenv.Fsck(t, fs, n.pool.Template(key))
}

func TestPublishIsIdempotent(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("v1", "ext4", 64<<20)
	n.mustPublish(r)
	if res := n.mustPublish(r); !res.Existed {
		t.Error("the second publish made something")
	}
	if c := testenv.Mounts(t, n.kubelet); c != 1 {
		t.Errorf("%d mounts", c)
	}
	for name, change := range map[string]func(*InlineRequest){
		"size":       func(r *InlineRequest) { r.Spec.Size *= 2 },
		"filesystem": func(r *InlineRequest) { r.Spec.Filesystem = "btrfs"; r.Spec.Size = 128 << 20 },
		"label":      func(r *InlineRequest) { r.Spec.Label = "other" },
		"read-only":  func(r *InlineRequest) { r.ReadOnly = true },
		"mode":       func(r *InlineRequest) { r.Mode = image.ModeDiskImage },
	} {
		other := r
		change(&other)
		if _, err := n.PublishInline(t.Context(), other); !errors.Is(err, errdefs.ErrExists) {
			t.Errorf("%s changed: %v", name, err)
		} else {
			t.Log(err)
		}
	}
	elsewhere := r
	elsewhere.Target = n.target("elsewhere")
	if _, err := n.PublishInline(t.Context(), elsewhere); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("another target: %v", err)
	}
	second := n.request("v2", "ext4", 64<<20)
	second.Target = r.Target
	if _, err := n.PublishInline(t.Context(), second); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("a target that has another volume: %v", err)
	}
	if err := n.Unpublish("v2", r.Target); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("unpublishing an unknown volume at the target of another: %v", err)
	}
	n.mustUnpublish(r)
	n.mustUnpublish(r)
}

// TestPublishGoesOn repeats a publish that died after each of its effects.
func TestPublishGoesOn(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	for _, mode := range image.MountModes {
		t.Run(string(mode), func(t *testing.T) {
			n := &node{n.Manager, t, n.kubelet}
			r := n.request("half-"+strings.ToLower(string(mode)), "ext4", 64<<20)
			r.Mode = mode
			img, err := n.newImage(r)
			if err != nil {
				t.Fatal(err)
			}
			if err := n.images.Link(img); err != nil {
				t.Fatal(err)
			}
			img.Close()
			if res := n.mustPublish(r); !res.Existed {
				t.Error("the image was made anew")
			}
			if mode == image.ModeDiskImage { // the publish died between its two mounts
				testenv.Run(t, "umount", filepath.Join(r.Target, image.DiskName))
				n.mustPublish(r)
				if findmnt(t, "FSTYPE", filepath.Join(r.Target, image.DiskName)) != "xfs" {
					t.Error("disk.img is not bound again")
				}
			}
			n.mustUnpublish(r)
		})
	}
	t.Run("attached, not mounted", func(t *testing.T) {
		n := &node{n.Manager, t, n.kubelet}
		r := n.request("attached", "ext4", 64<<20)
		n.mustPublish(r)
		img, err := n.images.Open(r.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		indices, err := loopdev.Find(img.File)
		if err != nil || len(indices) != 1 {
			t.Fatalf("%v %v", indices, err)
		}
		held, err := loopdev.Open(indices[0])
		if err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "umount", r.Target)
		n.mustPublish(r)
		held.Close()
		if again, err := loopdev.Find(img.File); err != nil || len(again) != 1 || again[0] != indices[0] {
			t.Errorf("the volume was on loop %v, and is on %v now: %v", indices, again, err)
		}
		img.Close()
		n.mustUnpublish(r)
	})
}

func TestReadOnly(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	for _, fs := range diskfs.Names() {
		r := n.request("ro-"+fs, fs, 300<<20)
		r.ReadOnly = true
		n.mustPublish(r)
		if err := os.WriteFile(filepath.Join(r.Target, "f"), nil, 0o644); !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: writing gave %v", fs, err)
		}
		n.mustUnpublish(r)
	}
}

func TestDiskImage(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 1<<30)
			r := n.request("vm-disk", "ext4", 64<<20)
			r.Mode = image.ModeDiskImage
			n.mustPublish(r)
			disk := filepath.Join(r.Target, image.DiskName)
			if fi, err := os.Stat(disk); err != nil || fi.Size() != r.Spec.Size {
				t.Fatalf("disk.img: %v", err)
			}
			testenv.Fsck(t, "ext4", disk)
			testenv.NoLoopsBelow(t, n.pool.Root())
			f, err := os.OpenFile(disk, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte("hello"), 32<<20); err != nil {
				t.Error(err)
			}
			f.Close()
			// No other file fits beside the disk, and the disk cannot be exchanged.
			if err := os.WriteFile(filepath.Join(r.Target, "other"), nil, 0o644); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("another file: %v", err)
			}
			if err := os.Remove(disk); !errors.Is(err, syscall.EBUSY) {
				t.Errorf("removing disk.img: %v", err)
			}
			if u, err := n.Stats(r.ID, r.Target); err != nil || u.TotalBytes != r.Spec.Size {
				t.Errorf("stats %+v: %v", u, err)
			}
			n.mustUnpublish(r)

			r = n.request("vm-disk-ro", "ext4", 64<<20)
			r.Mode, r.ReadOnly = image.ModeDiskImage, true
			n.mustPublish(r)
			if _, err := os.OpenFile(filepath.Join(r.Target, image.DiskName), os.O_RDWR, 0); !errors.Is(err, syscall.EROFS) {
				t.Errorf("opening a read-only disk for writing: %v", err)
			}
			n.mustUnpublish(r)
		})
	}
}

func TestBadTargets(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	for name, target := range harnesstest.BadTargets(t, n.kubelet) {
		r := n.request("bad", "ext4", 64<<20)
		r.Target = target.Path
		_, err := n.PublishInline(t.Context(), r)
		if t.Logf("%s: %v", name, err); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if err := n.Unpublish(r.ID, r.Target); (err == nil) != target.Below {
			t.Errorf("%s: unpublish: %v", name, err)
		}
	}
}

// TestUnpublishLeavesOthersAlone has mounts at the target that are not the volume's.
func TestUnpublishLeavesOthersAlone(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("mine", "ext4", 64<<20)
	if err := n.Unpublish("unknown", n.target("unknown")); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	n.mustPublish(r)
	testenv.Umount(t, r.Target)
	testenv.Run(t, "mount", "-t", "tmpfs", "somebody-elses", r.Target)
	if _, err := n.PublishInline(t.Context(), r); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("publish below another mount: %v", err)
	}
	if err := n.Unpublish(r.ID, r.Target); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("unpublish below another mount: %v", err)
	}
	if got := findmnt(t, "SOURCE", r.Target); got != "somebody-elses" {
		t.Errorf("the other mount is %q now", got)
	}
	testenv.Run(t, "umount", r.Target)
	n.mustUnpublish(r)
}

// TestUnpublishElsewhere unpublishes a volume at a target where it is not. The volume stays.
func TestUnpublishElsewhere(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("here", "ext4", 64<<20)
	n.mustPublish(r)
	elsewhere := n.target("elsewhere")
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := n.Unpublish(r.ID, elsewhere); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(elsewhere); err != nil {
		t.Errorf("a directory that is not its target: %v", err)
	}
	if res := n.mustPublish(r); !res.Existed {
		t.Error("the volume is gone")
	}
	n.mustUnpublish(r)
}

// TestShutDown shuts down the xfs of a running pod, as a disk error does. It returns EIO to
// every call from then on, and must be unmounted all the same.
func TestShutDown(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("broken", "xfs", 300<<20)
	n.mustPublish(r)
	testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", r.Target)
	if _, err := os.ReadDir(r.Target); !errors.Is(err, syscall.EIO) {
		t.Errorf("reading it: %v", err)
	}
	if _, err := n.PublishInline(t.Context(), r); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("publishing it again: %v", err)
	}
	if u, err := n.Stats(r.ID, r.Target); err != nil || u.TotalBytes == 0 {
		t.Errorf("stats %+v: %v", u, err)
	}
	n.mustUnpublish(r)
}

// TestDiskImageRemoved removes disk.img from a mount namespace without the bind mount, as a
// pod may. That removes the host's bind mount too.
func TestDiskImageRemoved(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("removed", "ext4", 64<<20)
	r.Mode = image.ModeDiskImage
	n.mustPublish(r)
	disk := filepath.Join(r.Target, image.DiskName)
	testenv.Run(t, "unshare", "--mount", "sh", "-c", "umount "+disk+" && rm "+disk)
	if _, err := os.Lstat(disk); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("disk.img: %v", err)
	}
	n.mustPublish(r)
	if fi, err := os.Stat(disk); err != nil || fi.Size() != r.Spec.Size {
		t.Errorf("published again: %v", err)
	}
	testenv.Run(t, "unshare", "--mount", "sh", "-c", "umount "+disk+" && rm "+disk)
	n.mustUnpublish(r)
}

// TestDiskImageGrown enlarges a disk.img, as a pod may. The volume must not count as larger.
func TestDiskImageGrown(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("grown", "ext4", 64<<20)
	r.Mode = image.ModeDiskImage
	n.mustPublish(r)
	if err := os.Truncate(filepath.Join(r.Target, image.DiskName), 1<<40); err != nil {
		t.Error(err)
	}
	if u, err := n.Stats(r.ID, r.Target); err != nil || u.TotalBytes != r.Spec.Size {
		t.Errorf("stats %+v: %v", u, err)
	}
	n.mustPublish(r)
	n.mustUnpublish(r)
}

// TestTorn has images as a power cut may leave them before their publish returned.
func TestTorn(t *testing.T) {
	n := newNode(t, testenv.Btrfs, 1<<30)
	for name, tear := range map[string]func(f *os.File, template string) error{
		"empty": func(f *os.File, _ string) error { return f.Truncate(0) },
		"without its identity": func(f *os.File, template string) error {
			b := make([]byte, 4096)
			from, err := os.Open(template)
			if err != nil {
				return err
			}
			defer from.Close()
			if _, err := from.ReadAt(b, 0); err != nil {
				return err
			}
			_, err = f.WriteAt(b, 0)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := &node{n.Manager, t, n.kubelet}
			r := n.request("torn", "ext4", 64<<20)
			img, err := n.newImage(r)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(n.images.Link(img), tear(img.File, n.pool.Template(img.Record.Template))); err != nil {
				t.Fatal(err)
			}
			img.Close()
			if res := n.mustPublish(r); res.Existed {
				t.Error("a torn image was published")
			}
			n.mustUnpublish(r)
		})
	}
}

func TestBusy(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("busy", "ext4", 64<<20)
	n.mustPublish(r)
	f, err := os.Create(filepath.Join(r.Target, "open"))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Unpublish(r.ID, r.Target); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("unpublishing a volume in use: %v", err)
	} else {
		t.Log(err)
	}
	f.Close()
	n.mustUnpublish(r)
}

// TestFullPool clones and mounts on a pool without space.
func TestFullPool(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 400<<20)
			first := n.request("first", "ext4", 64<<20)
			n.mustPublish(first)
			testenv.Fill(t, n.pool.Root())
			var failed error
			var made []InlineRequest
			// A clone costs a few blocks of metadata: some still fit.
			for i := 0; failed == nil && i < 3000; i++ {
				r := n.request(fmt.Sprintf("more-%d", i), "ext4", 64<<20)
				if _, failed = n.PublishInline(t.Context(), r); failed == nil {
					made = append(made, r)
				}
			}
			t.Logf("after %d more volumes: %v", len(made), failed)
			if !errors.Is(failed, pool.ErrFull) {
				t.Errorf("a full pool: %v", failed)
			}
			names, err := n.pool.Volumes()
			if err != nil || len(names) != 1+len(made) {
				t.Errorf("%d volumes for %d published: %v", len(names), 1+len(made), err)
			}
			testenv.Eventually(t, "a loop device for each volume", func() bool {
				return len(testenv.LoopsBelow(t, n.pool.Root())) == 1+len(made)
			})
			for _, r := range append(made, first) {
				n.mustUnpublish(r)
			}
			if err := os.Remove(filepath.Join(n.pool.Root(), "filler")); err != nil {
				t.Error(err)
			}
			again := n.request("again", "ext4", 64<<20)
			n.mustPublish(again)
			n.mustUnpublish(again)
		})
	}
}

func TestConcurrent(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 1<<30)
			var wg sync.WaitGroup
			for w := range 16 {
				wg.Go(func() {
					for i := range 4 {
						r := n.request(fmt.Sprintf("c-%d-%d", w, i), []string{"ext4", "xfs", "btrfs"}[w%3], 300<<20)
						if _, err := n.PublishInline(t.Context(), r); err != nil {
							t.Error(err)
							continue
						}
						n.mustUnpublish(r)
					}
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkPublish publishes and unpublishes on a pool that has the template.
func BenchmarkPublish(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, fs := range diskfs.Names() {
			b.Run(kind.Name+"-pool/"+fs, func(b *testing.B) {
				n := newNode(b, kind, 1<<30)
				warm := n.request("warm", fs, 300<<20)
				n.mustPublish(warm)
				n.mustUnpublish(warm)
				r := n.request("bench", fs, 300<<20)
				for b.Loop() {
					n.mustPublish(r)
					b.StopTimer()
					n.mustUnpublish(r)
					b.StartTimer()
				}
			})
		}
	}
}

// BenchmarkSpawnedTools makes a formatted, mounted disk like BenchmarkPublish, on the same
// pool, but with mkfs and mount(8).
func BenchmarkSpawnedTools(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, name := range diskfs.Names() {
			b.Run(kind.Name+"-pool/"+name, func(b *testing.B) {
				fs, err := diskfs.Lookup(name)
				if err != nil {
					b.Fatal(err)
				}
				dir := kind.Mount(b, 1<<30)
				image, at := filepath.Join(dir, "image"), testenv.Dir(b)
				for b.Loop() {
					if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 300<<20)); err != nil {
						b.Fatal(err)
					}
					testenv.Run(b, fs.Mkfs, fs.MkfsArgs(image, "", nil)...)
					testenv.Run(b, "mount", "-o", "loop", image, at)
					b.StopTimer()
					testenv.Run(b, "umount", at)
					if err := os.Remove(image); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		}
	}
}
