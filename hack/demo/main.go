// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Command demo shows the plugin at work. It starts the real binary on a pool of its own, makes the calls that kubelet
// makes, and asks the kernel (mountinfo, statfs, blkid, sysfs) what came of them.
//
// The pool stays between runs, so that a second run finds its templates. Everything else is removed in the end, whether
// the run went well or not. The next run finds and removes what a killed run left.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

const (
	// kubeletDir always has the same name, so that a run knows what an earlier one left. One demo runs at a time: its
	// lock is on this directory.
	kubeletDir = "/run/csi-disktemplate-demo"
	// idPrefix marks the demo's volumes. Nothing else in a pool is touched.
	idPrefix = "demo-"

	poolSize   = "10Gi"
	volumeSize = "1Gi"
	copies     = 2
	payload    = 1 << 20 // of random bytes in each volume

	// readyTimeout is what the plugin gets to make a pool and to unpack a kernel.
	readyTimeout = time.Minute
	// stopTimeout is Kubernetes' default terminationGracePeriodSeconds.
	stopTimeout = 30 * time.Second
)

func init() {
	// The plugin gets a signal when the thread that started it ends. This one lives as long as the process does.
	runtime.LockOSThread()
}

func main() {
	var d demo
	flag.StringVar(&d.binary, "plugin", "bin/csi-disktemplate", "the plugin's `binary`")
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
	binary, dir string

	lock *os.File // kubeletDir
	harness.Node
	*harness.Client
	*harness.Plugin
	root    string // the pool: dir, or the mount in it; empty until the plugin is ready
	volumes []*vol
}

func (d *demo) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it mounts: run `sudo make demo`")
	}
	// su without - leaves these out of PATH.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	if d.dir, err = filepath.Abs(d.dir); err != nil {
		return err
	}
	d.Node = harness.Node{Pool: d.dir, Kubelet: kubeletDir}
	if err := d.exclude(); err != nil {
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

// exclude makes the directory that stands for kubelet's, and keeps other demos out.
func (d *demo) exclude() (err error) {
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

// start starts the plugin and waits until it is ready.
func (d *demo) start(ctx context.Context) (err error) {
	say("Starting the plugin on a pool of its own.")
	began := time.Now()
	if err := d.Make(); err != nil {
		return err
	}
	if d.Client, err = d.Connect(); err != nil {
		return err
	}
	if d.Plugin, err = d.Start(harness.Command{
		Binary: d.binary, ID: "demo", Flags: []string{"--loopback-pool-size", poolSize},
		Deathsig: syscall.SIGTERM, // if the demo is killed
	}); err != nil {
		return err
	}
	info, err := d.ready(ctx)
	if err != nil {
		return err
	}
	d.root = d.dir
	on := "a directory on a filesystem that can share extents"
	if mounts, err := harness.Mounts(d.loopbackMount()); err != nil {
		return err
	} else if len(mounts) > 0 {
		d.root = d.loopbackMount()
		on = "an xfs in a sparse file of " + poolSize
	}
	d.Pool = d.root
	detail("pool     %s (%s)", d.dir, on)
	detail("kubelet  %s", kubeletDir)
	detail("%s %s is ready after %s", info.GetName(), info.GetVendorVersion(), seconds(time.Since(began)))
	return d.sweep(ctx)
}

// ready waits until the plugin says that its pool and formatter can be used.
func (d *demo) ready(ctx context.Context) (*csi.GetPluginInfoResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	if err := d.Serves(ctx, d.Client); err != nil {
		return nil, err
	}
	if _, err := d.Probe(ctx, &csi.ProbeRequest{}); err != nil {
		return nil, fmt.Errorf("the plugin is not ready: %w", err)
	}
	return d.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
}

func (d *demo) loopbackMount() string { return filepath.Join(d.dir, "mnt") }

// stop ends the plugin as Kubernetes does, and unmounts the pool.
func (d *demo) stop(context.Context) error {
	say("Stopping the plugin with SIGTERM.")
	began := time.Now()
	if err := d.Stop(stopTimeout); err != nil {
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
	mounts, err := harness.Mounts(d.loopbackMount())
	if err != nil || len(mounts) == 0 {
		return err
	}
	// A process that is being started may have a copy of a volume's mount. Until that ends, the pool is busy.
	if err := eventually(func() error { return unix.Unmount(d.loopbackMount(), 0) }); err != nil {
		return fmt.Errorf("umount %s: %w", d.loopbackMount(), err)
	}
	pool := harness.Node{Pool: d.dir, Kubelet: kubeletDir}
	return eventually(func() error {
		found, err := pool.Find()
		if err == nil && len(found.Loops) > 0 {
			err = fmt.Errorf("the pool's loop devices are left: %s", strings.Join(found.Loops, ", "))
		}
		return err
	})
}

// sweep removes the demo's volumes, those of this run and of earlier ones.
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

// sweepOne removes a volume, whichever run made it.
func (d *demo) sweepOne(ctx context.Context, path string) error {
	var v image.Record
	if err := readRecord(path, pool.VolumeAttr, &v); err != nil {
		return err
	}
	if v.Lifecycle == image.Claim {
		return d.newClaim(v.ID).end(ctx, d)
	}
	return d.Unpublish(ctx, &harness.Volume{ID: v.ID, Target: v.Target})
}

// cleanUp leaves nothing but the pool and, after a failure, the log.
func (d *demo) cleanUp(failed bool) error {
	defer d.lock.Close()
	var errs []error
	if d.Plugin != nil {
		var swept error
		if d.root != "" && d.Alive() {
			swept = d.sweep(context.Background())
		}
		// After a success the plugin has ended. After a failure there is an error already, and that the plugin died adds
		// nothing to it.
		if d.Stop(stopTimeout) == nil {
			errs = append(errs, swept)
		}
		if failed {
			d.showLog()
		} else {
			errs = append(errs, os.Remove(d.Log))
		}
	}
	if d.Client != nil {
		d.Conn.Close()
	}
	// A plugin that died left its mounts. The directory may go only after them: removing it before would empty what is
	// mounted there.
	mounts, err := harness.Mounts(kubeletDir)
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

// showLog prints the end of the plugin's log and where the rest is.
func (d *demo) showLog() {
	b, err := os.ReadFile(d.Log)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	lines = lines[max(0, len(lines)-15):]
	fmt.Fprintf(os.Stderr, "\nThe end of the plugin's log; all of it is in %s:\n%s\n", d.Log, bytes.Join(lines, []byte("\n")))
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
