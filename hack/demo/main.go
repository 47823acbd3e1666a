// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Command demo shows the plugin at work: it starts the real binary on a pool of
// its own, does to it over gRPC what kubelet would do, and looks with the
// kernel's eyes (mountinfo, statfs, blkid, sysfs) at what came of it.
//
// The pool stays between runs, so that a second run finds its templates. All
// else is gone afterwards, whether it went well or not; what a killed run left
// is found and removed by the next.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

const (
	// kubeletDir always has the same name, so that a run knows what an earlier
	// one left. One demo runs at a time: its lock is on this directory.
	kubeletDir = "/run/csi-disktemplate-demo"
	// idPrefix marks the demo's volumes: nothing else in a pool is touched.
	idPrefix = "demo-"

	poolSize   = "10Gi"
	volumeSize = "1Gi"
	copies     = 2
	payload    = 1 << 20 // of random bytes in each volume

	// publishTimeout is kubelet's for a CSI call; a template takes seconds.
	publishTimeout = 2 * time.Minute
	// settleTimeout is what the kernel gets to detach loop devices and to free
	// space, which it does in the background, in milliseconds.
	settleTimeout = 10 * time.Second
)

// filesystems are shown one after the other; f_type is from statfs(2).
var filesystems = []struct {
	name  string
	magic int64
}{
	{"btrfs", unix.BTRFS_SUPER_MAGIC},
	{"xfs", unix.XFS_SUPER_MAGIC},
	{"ext4", unix.EXT4_SUPER_MAGIC},
}

func init() {
	// The plugin gets a signal when the thread that started it dies. This one
	// lives as long as the process does.
	runtime.LockOSThread()
}

func main() {
	var d demo
	flag.StringVar(&d.plugin, "plugin", "bin/csi-disktemplate", "the plugin's `binary`")
	flag.StringVar(&d.dir, "pool", "/var/cache/csi-disktemplate-demo", "`directory` of the pool; made if missing, kept afterwards")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := d.run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// demo is one run.
type demo struct {
	plugin, dir string

	lock *os.File // kubeletDir
	*process
	root    string // of the pool: dir, or the mount in it
	volumes []*vol
}

// vol is one published volume.
type vol struct {
	fs, id, pod, target string
	magic               int64
	greeting            string
	took                time.Duration // of the publish call
	record              volume.Record
	template            template.Record
	hit                 bool // the template was there before the run
	freed               int64
}

func (d *demo) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, as it mounts: run `sudo make demo`")
	}
	// su without - leaves these out of PATH.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	if err := d.claim(); err != nil {
		return err
	}
	defer func() {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		err = errors.Join(err, d.cleanUp(err != nil))
	}()
	for _, step := range []func(context.Context) error{d.start, d.publish, d.inspect, d.unpublish, d.claims, d.stop} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.report()
}

// claim makes the directory that plays kubelet's, and keeps other demos out.
func (d *demo) claim() (err error) {
	if err := os.Mkdir(kubeletDir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.Chmod(kubeletDir, 0o755); err != nil { // whatever the umask
		return err
	}
	if d.lock, err = os.Open(kubeletDir); err != nil {
		return err
	}
	if err := syscall.Flock(int(d.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		d.lock.Close()
		return fmt.Errorf("another demo is running: %s is locked (%w)", kubeletDir, err)
	}
	return nil
}

// start starts the plugin and waits until it says that it is ready.
func (d *demo) start(ctx context.Context) error {
	say("Starting the plugin on a pool of its own.")
	began := time.Now()
	var err error
	if d.process, err = startPlugin(d.plugin, d.dir); err != nil {
		return err
	}
	info, err := d.ready(ctx)
	if err != nil {
		return err
	}
	d.root = d.dir
	on := "a directory on a filesystem that can share extents"
	if mounts, err := mountsBelow(d.loopbackMount()); err != nil {
		return err
	} else if len(mounts) > 0 {
		d.root = d.loopbackMount()
		on = "an xfs in a sparse file of " + poolSize
	}
	detail("pool     %s (%s)", d.dir, on)
	detail("kubelet  %s", kubeletDir)
	detail("%s %s is ready after %s", info.GetName(), info.GetVendorVersion(), seconds(time.Since(began)))
	return d.sweep(ctx)
}

func (d *demo) loopbackMount() string { return filepath.Join(d.dir, "mnt") }

// publish asks for the volumes as kubelet would for those of pods.
func (d *demo) publish(ctx context.Context) error {
	say("Publishing %d inline volumes of each filesystem, %s each.", copies, volumeSize)
	for _, fs := range filesystems {
		for i := range copies {
			pod := uuid.NewString()
			v := &vol{
				fs: fs.name, magic: fs.magic,
				id: fmt.Sprintf("%s%s-%d", idPrefix, fs.name, i+1), pod: pod,
				target: filepath.Join(kubeletDir, "pods", pod, "volumes", "kubernetes.io~csi", "data", "mount"),
			}
			if err := d.publishOne(ctx, v); err != nil {
				return fmt.Errorf("publishing %s: %w", v.id, err)
			}
			d.volumes = append(d.volumes, v)
			what := "from the template that is there now"
			switch {
			case i == 0 && v.hit:
				what = "from a template of an earlier run"
			case i == 0:
				what = fmt.Sprintf("its template was built in a VM first, in %s", milliseconds(v.template.BuildMS))
			}
			detail("%-7s  %9s  %s", v.id[len(idPrefix):], seconds(v.took), what)
		}
	}
	return nil
}

func (d *demo) publishOne(ctx context.Context, v *vol) error {
	if err := os.MkdirAll(filepath.Dir(v.target), 0o750); err != nil { // as kubelet does
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	began := time.Now()
	_, err := d.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:   v.id,
		TargetPath: v.target,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral":           "true",
			"csi.storage.k8s.io/pod.name":            v.id,
			"csi.storage.k8s.io/pod.namespace":       "demo",
			"csi.storage.k8s.io/pod.uid":             v.pod,
			"csi.storage.k8s.io/serviceAccount.name": "default",
			"size":                                   volumeSize,
		},
	})
	v.took = time.Since(began)
	if err != nil {
		return err
	}
	// The images themselves say how they came about.
	if err := readRecord(filepath.Join(d.root, "volumes", v.id), pool.VolumeAttr, &v.record); err != nil {
		return err
	}
	if err := readRecord(filepath.Join(d.root, "templates", v.record.Template), pool.TemplateAttr, &v.template); err != nil {
		return err
	}
	v.hit = v.template.Built.Before(began)
	return nil
}

// inspect holds the volumes to their promise: real filesystems, each its own.
func (d *demo) inspect(context.Context) error {
	say("Writing a different file into each, and %s of random bytes; reading them back.", size(payload))
	for _, v := range d.volumes {
		v.greeting = fmt.Sprintf("I am %s of pod %.8s", v.id[len(idPrefix):], v.pod)
		if err := v.write(); err != nil {
			return fmt.Errorf("writing to %s: %w", v.id, err)
		}
	}
	uuids, greetings := map[string]string{}, map[string]string{}
	for _, v := range d.volumes {
		device, id, err := v.mounted()
		if err != nil {
			return fmt.Errorf("looking at %s: %w", v.id, err)
		}
		if other, used := uuids[id]; used {
			return fmt.Errorf("%s and %s have the same UUID %s", other, v.id, id)
		}
		uuids[id] = v.id
		got, err := os.ReadFile(filepath.Join(v.target, "greeting"))
		if err != nil {
			return err
		}
		if string(got) != v.greeting {
			return fmt.Errorf("%s holds %q, written was %q", v.id, got, v.greeting)
		}
		if other, used := greetings[string(got)]; used {
			return fmt.Errorf("%s and %s hold the same file", other, v.id)
		}
		greetings[string(got)] = v.id
		detail("%-7s  %-11s  UUID %s  %q", v.id[len(idPrefix):], device, id, got)
	}
	detail("%d mounted filesystems, %d UUIDs, %d different files", len(d.volumes), len(uuids), len(greetings))
	return nil
}

// write fills the volume and waits until all of it is in the pool.
func (v *vol) write() error {
	random := make([]byte, payload)
	rand.Read(random)
	for name, content := range map[string][]byte{"greeting": []byte(v.greeting), "random": random} {
		if err := os.WriteFile(filepath.Join(v.target, name), content, 0o644); err != nil {
			return err
		}
	}
	return syncFS(v.target)
}

// mounted asks the kernel what is mounted at the target, and blkid, which knows
// nothing of the plugin, which filesystem that is.
func (v *vol) mounted() (device, id string, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(v.target))
	if err != nil {
		return "", "", err
	}
	if len(mounts) != 1 || mounts[0].FSType != v.fs {
		return "", "", fmt.Errorf("mountinfo has no mount of %s at %s", v.fs, v.target)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(v.target, &st); err != nil {
		return "", "", err
	}
	if int64(st.Type) != v.magic {
		return "", "", fmt.Errorf("statfs sees f_type %#x, %s is %#x", st.Type, v.fs, v.magic)
	}
	device = mounts[0].Source
	out, err := exec.Command("blkid", "-p", "-o", "value", "-s", "UUID", device).Output()
	if err != nil {
		return "", "", fmt.Errorf("blkid -p %s: %w", device, err)
	}
	return device, strings.TrimSpace(string(out)), nil
}

// unpublish takes the volumes away, one filesystem after the other, and measures
// what space that gives back.
func (d *demo) unpublish(ctx context.Context) error {
	say("Unpublishing them.")
	for i := 0; i < len(d.volumes); i += copies {
		pair := d.volumes[i : i+copies]
		before, err := d.available()
		if err != nil {
			return err
		}
		for _, v := range pair {
			if err := d.unpublishOne(ctx, v.id, v.target); err != nil {
				return err
			}
		}
		if err := d.left(len(d.volumes) - i - copies); err != nil {
			return err
		}
		after, err := d.available()
		if err != nil {
			return err
		}
		pair[0].freed = after - before
	}
	detail("nothing is left: no image in %s, no loop device of one, no mount below %s", filepath.Join(d.root, "volumes"), kubeletDir)
	return nil
}

func (d *demo) unpublishOne(ctx context.Context, id, target string) error {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if _, err := d.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}); err != nil {
		return fmt.Errorf("unpublishing %s: %w", id, err)
	}
	return nil
}

// left waits until there are as many images, loop devices and mounts as there
// are volumes, and else says what there is.
func (d *demo) left(volumes int) error {
	return eventually(func() error {
		images, err := filepath.Glob(filepath.Join(d.root, "volumes", idPrefix+"*"))
		if err != nil {
			return err
		}
		loops, err := loopsBelow(filepath.Join(d.root, "volumes"))
		if err != nil {
			return err
		}
		mounts, err := mountsBelow(kubeletDir)
		if err != nil {
			return err
		}
		if len(images) != volumes || len(loops) != volumes || len(mounts) != volumes {
			return fmt.Errorf("with %d volumes there are the images %v, the loop devices %v and the mounts %v", volumes, images, loops, mounts)
		}
		return nil
	})
}

// stop ends the plugin as Kubernetes would, and unmounts the pool.
func (d *demo) stop(context.Context) error {
	say("Stopping the plugin with SIGTERM.")
	began := time.Now()
	if err := d.process.stop(); err != nil {
		return err
	}
	detail("it exited with code 0 after %s", seconds(time.Since(began)))
	if d.root == d.dir {
		return nil
	}
	if err := d.unmountPool(); err != nil {
		return err
	}
	detail("the pool is unmounted; %s stays for the next run (make demo-clean removes it)", d.dir)
	return nil
}

// unmountPool unmounts the loopback pool, if there is one and it is mounted.
func (d *demo) unmountPool() error {
	mounts, err := mountsBelow(d.loopbackMount())
	if err != nil || len(mounts) == 0 {
		return err
	}
	if err := unix.Unmount(d.loopbackMount(), 0); err != nil {
		return fmt.Errorf("umount %s: %w", d.loopbackMount(), err)
	}
	return eventually(func() error {
		loops, err := loopsBelow(d.dir)
		if err == nil && len(loops) > 0 {
			err = fmt.Errorf("loop devices of the pool are left: %s", strings.Join(loops, ", "))
		}
		return err
	})
}

// report prints what was measured.
func (d *demo) report() error {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "FILESYSTEM\tTEMPLATE BUILT IN\tACCELERATOR\tPUBLISH, COLD\tPUBLISH AGAIN\tSPACE OF BOTH*")
	hits := 0
	for i := 0; i < len(d.volumes); i += copies {
		first, second := d.volumes[i], d.volumes[i+1]
		built := milliseconds(first.template.BuildMS)
		if first.hit {
			hits++
			built = "hit (" + built + " then)"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", first.fs, built, first.template.Provenance.Accelerator,
			seconds(first.took), seconds(second.took), size(first.freed))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("* What the pool had more of (statfs) once both were unpublished: all that %d disks of %s with\n"+
		"  %s of files each took beside their template.\n", copies, volumeSize, size(payload))
	fmt.Printf("\nTemplates: %d built, %d hit.\n", len(filesystems)-hits, hits)
	return nil
}

// sweep takes the demo's volumes away, those of this run and of runs before.
func (d *demo) sweep(ctx context.Context) error {
	dir := filepath.Join(d.root, "volumes")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), idPrefix) {
			errs = append(errs, d.sweepOne(ctx, filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(append(errs, d.deleteSnapshot(ctx))...)
}

// cleanUp leaves nothing but the pool and, after a failure, the log.
func (d *demo) cleanUp(failed bool) error {
	defer d.lock.Close()
	var errs []error
	if d.process != nil {
		var swept error
		if d.root != "" && d.alive() {
			swept = d.sweep(context.Background())
		}
		// On success it has ended already, and else there is an error already. One
		// that died is no news either.
		if d.process.stop() == nil {
			errs = append(errs, swept)
		}
		if failed {
			d.showLog()
		} else {
			errs = append(errs, os.Remove(d.log.Name()))
		}
		d.log.Close()
	}
	// What a plugin that died left mounted. Only then may the directory go:
	// removing what is mounted would empty it.
	mounts, err := mountsBelow(kubeletDir)
	errs = append(errs, err)
	for _, m := range slices.Backward(mounts) {
		if e := unix.Unmount(m, unix.UMOUNT_NOFOLLOW); e != nil {
			err = fmt.Errorf("umount %s: %w", m, e)
			errs = append(errs, err)
		}
	}
	if err == nil {
		errs = append(errs, os.RemoveAll(kubeletDir))
	}
	return errors.Join(append(errs, d.unmountPool())...)
}

// available is the space that the pool has left, once that stands still.
func (d *demo) available() (int64, error) {
	last := int64(-1)
	for end := time.Now().Add(settleTimeout); ; time.Sleep(100 * time.Millisecond) {
		if err := syncFS(d.root); err != nil {
			return 0, err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(d.root, &st); err != nil {
			return 0, err
		}
		now := int64(st.Bavail) * st.Bsize
		if now == last || time.Now().After(end) {
			return now, nil
		}
		last = now
	}
}

// syncFS waits until what was written is on disk: syncfs(2).
func syncFS(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(f.Fd())))
}

// loopsBelow lists the loop devices whose backing file is, or was, in dir; see
// Documentation/ABI/testing/sysfs-block-loop.
func loopsBelow(dir string) ([]string, error) {
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && bytes.HasPrefix(b, []byte(dir+"/")) { // an error: detached meanwhile
			found = append(found, "/dev/"+strings.Split(name, "/")[3])
		}
	}
	return found, nil
}

// mountsBelow lists the mounts at dir and below it.
func mountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	var paths []string
	for _, m := range infos {
		paths = append(paths, m.Mountpoint)
	}
	return paths, err
}

func readRecord(path string, attr pool.Attr, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return pool.GetRecord(f, attr, v)
}

// eventually repeats what may take the kernel a moment.
func eventually(f func() error) error {
	for end := time.Now().Add(settleTimeout); ; time.Sleep(20 * time.Millisecond) {
		if err := f(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

func say(format string, args ...any)    { fmt.Printf("\n"+format+"\n", args...) }
func detail(format string, args ...any) { fmt.Printf("  "+format+"\n", args...) }

func seconds(t time.Duration) string {
	if t < time.Second {
		return fmt.Sprintf("%.1f ms", float64(t.Microseconds())/1e3)
	}
	return fmt.Sprintf("%.1f s", t.Seconds())
}

func milliseconds(ms int64) string { return seconds(time.Duration(ms) * time.Millisecond) }

func size(bytes int64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }
