// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// poolKind is where a pool is, and on which filesystem.
type poolKind struct {
	name, fs string
	ram      bool
	sparse   int64 // bytes; 0: poolSize, and on a disk not sparse
}

var poolKinds = []poolKind{
	{name: "ram-xfs", fs: "xfs", ram: true}, {name: "ram-btrfs", fs: "btrfs", ram: true},
	{name: "disk-xfs", fs: "xfs"}, {name: "disk-btrfs", fs: "btrfs"},
}

// filesystems are those of volumes.
var filesystems = []string{"ext4", "xfs", "btrfs"}

const (
	poolSize   = 12 << 30
	volumeSize = 1 << 30

	// readyTimeout is what the plugin gets until it is ready, with 10,000 volumes on a busy machine.
	readyTimeout = 3 * time.Minute
	// stopTimeout is Kubernetes' default terminationGracePeriodSeconds.
	stopTimeout = 30 * time.Second
)

// pluginFlags take away the limits that a benchmark would run into, and keep nothing ready: that has cases of its own.
// Everything else is as users have it.
var pluginFlags = []string{
	"--headroom", "0", "--overcommit", "1000", "--max-inline-volumes", "0", "--template-cache", "0",
	"--max-template-builds-per-hour", "0", "--warm-max", "0",
	"--v", "2", // logs how long each sweep took
}

// bed is a pool with a plugin on it, and a directory beside the plugin's in which the other ways have their files.
type bed struct {
	kind   poolKind
	dir    string // holds everything
	root   string // where the pool's filesystem is mounted
	beside string
	loop   string // the pool's own device, without /dev
	node   harness.Node
	*harness.Plugin
	client *harness.Client

	templates map[kind]string // formatted images in beside
	loops     *indices
	serial    atomic.Int64
	ways      map[string]way
}

// newBed makes a pool and starts a plugin on it. The caller closes the bed, whatever the error.
func (b *bench) newBed(ctx context.Context, p poolKind) (*bed, error) {
	d := &bed{kind: p, dir: filepath.Join(b.dir, p.name), loops: &b.loops}
	d.root, d.beside = filepath.Join(d.dir, "fs"), filepath.Join(d.dir, "fs", "beside")
	d.node = harness.Node{Pool: filepath.Join(d.root, "pool"), Kubelet: filepath.Join(b.dir, p.name+".kubelet")}
	steps := []func() error{
		func() error { return d.makePool(ctx) },
		func() error { return d.copyTemplates(ctx, b.images) },
		d.node.Make,
		func() (err error) { d.client, err = d.node.Connect(); return err },
		func() error { return d.start(ctx, b.o.binary) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return d, fmt.Errorf("pool %s: %w", p.name, err)
		}
	}
	d.ways = map[string]way{
		plugin:     overCSI{d.client},
		floor:      straight{d.templates, d.loops, false},
		floorUUID:  straight{d.templates, d.loops, true},
		habit:      spawned{newFilesystem},
		otherHabit: spawned{copyOf(d.templates)},
		emptyDir:   dir{},
		volatile:   overVolatile{overCSI{d.client}},
		tmpfs:      inMemory{},
		claim:      overClaims{d.client, d.node},
	}
	switch {
	case b.peer != nil && os.Getenv("BENCH_PEER_CALLS") == "claim":
		d.ways[peer] = overClaims{b.peer, d.node}
	case b.peer != nil:
		d.ways[peer] = overCSI{b.peer}
	}
	return d, nil
}

// makePool makes the pool's filesystem in a file, on a tmpfs or on the disk. On the disk the file has all of its space,
// as a disk has. The pool has the loop device for itself: direct I/O, so that no page cache lies between.
func (d *bed) makePool(ctx context.Context) error {
	if err := os.MkdirAll(d.root, 0o755); err != nil {
		return err
	}
	if d.kind.ram {
		if err := unix.Mount("bench", d.dir, "tmpfs", 0, "size=20g"); err != nil {
			return fmt.Errorf("mount tmpfs: %w", err)
		}
		if err := os.Mkdir(d.root, 0o755); err != nil {
			return err
		}
	}
	image, err := os.Create(filepath.Join(d.dir, "pool.img"))
	if err != nil {
		return err
	}
	defer image.Close()
	switch {
	case d.kind.sparse > 0:
		err = image.Truncate(d.kind.sparse)
	case d.kind.ram:
		err = image.Truncate(poolSize)
	default:
		err = os.NewSyscallError("fallocate", unix.Fallocate(int(image.Fd()), 0, 0, poolSize))
	}
	if err != nil {
		return err
	}
	mkfs := map[string][]string{"xfs": {"mkfs.xfs", "-q", "-K", "-s", "size=4096"}, "btrfs": {"mkfs.btrfs", "-q", "--nodiscard"}}[d.kind.fs]
	if _, err := run(ctx, append(slices.Clone(mkfs), image.Name())...); err != nil {
		return err
	}
	return d.mountPool(image)
}

func (d *bed) mountPool(image *os.File) error {
	index, err := d.loops.take()
	if err != nil {
		return err
	}
	loop, err := os.OpenFile(loopPath(index), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer loop.Close()
	if err := attach(loop, image, image.Name()); err != nil {
		return err
	}
	d.loop = filepath.Base(loop.Name())
	data := map[string]string{"btrfs": "nodiscard"}[d.kind.fs]
	if err := unix.Mount(loop.Name(), d.root, d.kind.fs, 0, data); err != nil {
		return fmt.Errorf("mount the pool: %w", err)
	}
	if err := os.Mkdir(d.beside, 0o700); err != nil || d.kind.fs != "btrfs" {
		return err
	}
	return noCopyOnWrite(d.beside)
}

// noCopyOnWriteFlag is FS_NOCOW_FL of linux/fs.h.
const noCopyOnWriteFlag = 0x00800000

// noCopyOnWrite sets the attribute +C of chattr(1), as the plugin does for its images.
func noCopyOnWrite(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("FS_IOC_SETFLAGS", unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, noCopyOnWriteFlag))
}

// copyTemplates copies formatted images into the pool.
func (d *bed) copyTemplates(ctx context.Context, images map[kind]string) error {
	d.templates = map[kind]string{}
	for of, image := range images {
		d.templates[of] = filepath.Join(d.beside, "template-"+filepath.Base(image))
		if _, err := run(ctx, "cp", "--sparse=always", "--reflink=never", image, d.templates[of]); err != nil {
			return err
		}
	}
	return syncFS(d.root)
}

// start starts a plugin and waits until it is ready.
func (d *bed) start(ctx context.Context, binary string, flags ...string) (err error) {
	d.Plugin, err = d.node.Start(harness.Command{
		Binary: binary, ID: "bench", Flags: append(slices.Clone(pluginFlags), flags...), LogDir: filepath.Dir(d.dir),
		Deathsig: syscall.SIGTERM, // if this process is killed
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := d.Serves(ctx, d.client); err != nil {
		return fmt.Errorf("%w\n%s", err, d.Tail())
	}
	if _, err := d.client.Probe(ctx, &csi.ProbeRequest{}); err != nil {
		return fmt.Errorf("the plugin is not ready: %w", err)
	}
	return nil
}

// restart ends the plugin as Kubernetes does, and starts another one.
func (d *bed) restart(ctx context.Context, binary string, flags ...string) error {
	if err := d.Stop(stopTimeout); err != nil {
		return fmt.Errorf("%w\n%s", err, d.Tail())
	}
	return d.start(ctx, binary, flags...)
}

// close ends the plugin and removes everything, even what a failed case has left.
func (d *bed) close() error {
	var errs []error
	if d.client != nil {
		d.client.Conn.Close()
	}
	if d.Plugin != nil && d.Alive() {
		errs = append(errs, d.Stop(stopTimeout))
	}
	for _, below := range []string{d.node.Kubelet, d.root} {
		errs = append(errs, unmountBelow(below))
	}
	_, err := detachBelow(d.root)
	errs = append(errs, err, os.RemoveAll(d.node.Kubelet), unmount(d.root))
	if d.kind.ram {
		return errors.Join(append(errs, unmount(d.dir), os.RemoveAll(d.dir))...)
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// unmountBelow unmounts what is mounted below a directory.
func unmountBelow(dir string) error {
	mounts, err := harness.Mounts(dir)
	for _, at := range slices.Backward(mounts) {
		if at != dir {
			err = errors.Join(err, unmount(at))
		}
	}
	return err
}

// unmount unmounts one mount. Others may keep it busy for a moment: a process that is being started has a copy of it.
func unmount(at string) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Unmount(at, unix.UMOUNT_NOFOLLOW)
		if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // EINVAL: nothing is mounted there
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("umount %s: %w", at, err)
		}
	}
}

// volume is a new volume, with names of its own.
func (d *bed) volume(fsType string, size int64) *volume {
	id := "bench-" + strconv.FormatInt(d.serial.Add(1), 10)
	pod := harness.Pod{Namespace: "bench", Name: id, UID: id}
	c := d.node.Inline(id, fsType, pod, map[string]string{"size": strconv.FormatInt(size, 10)})
	return &volume{fs: fsType, size: size, id: id, pod: d.node.PodDir(id), target: c.Target, image: imagePath(d.beside, id), csi: c}
}

// syncFS waits until everything that was written is on disk: syncfs(2).
func syncFS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}

// free is the space of the pool, in bytes, that is neither taken nor to be freed in a moment.
func (d *bed) free() (int64, error) {
	if err := syncFS(d.root); err != nil {
		return 0, err
	}
	var st unix.Statfs_t
	err := unix.Statfs(d.root, &st)
	return int64(st.Bfree) * st.Bsize, os.NewSyscallError("statfs", err)
}

// written is how many bytes the pool's device was told to write since it was attached: Documentation/block/stat.rst.
func (d *bed) written() (int64, error) {
	b, err := os.ReadFile("/sys/block/" + d.loop + "/stat")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 7 {
		return 0, fmt.Errorf("/sys/block/%s/stat has %d fields", d.loop, len(fields))
	}
	sectors, err := strconv.ParseInt(fields[6], 10, 64)
	return sectors * 512, err
}

// names of the ways that take part in a case about volumes' lives, sorted. Two ways differ only inside a volume.
func (d *bed) names(without ...string) []string {
	without = append(without, volatile, tmpfs)
	return slices.DeleteFunc(slices.Sorted(maps.Keys(d.ways)), func(n string) bool { return slices.Contains(without, n) })
}
