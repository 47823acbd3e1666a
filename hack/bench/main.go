// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// workEnv tells the second process that it is in its own mount namespace, and which directory is for it.
const workEnv = "CSI_DISKTEMPLATE_BENCH_DIR"

// options are the command line.
type options struct {
	binary, out, dir string
	cases, pools     *regexp.Regexp
	quick, list      bool
	quote            string
	seed             uint64
}

func init() {
	// Children get a signal when the thread ends that started them. This one lives as long as the process does.
	runtime.LockOSThread()
}

func parse() (o options) {
	cases := flag.String("rows", "", "measure only the cases whose name matches this `regexp` (default: all); see --list")
	pools := flag.String("pools", "", "measure only on the pools whose name matches this `regexp` (default: all; of a quick run, ram-xfs and disk-btrfs)")
	flag.StringVar(&o.binary, "plugin", "bin/csi-disktemplate", "the plugin's `binary`")
	flag.StringVar(&o.out, "out", "bin/bench.out", "`directory` for the table, the JSON and the plots")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "`directory` on a disk, where the pools are made")
	flag.BoolVar(&o.quick, "quick", false, "fewer of everything, and two of the pools, in about four minutes")
	flag.StringVar(&o.quote, "quote", "", "measure nothing; replace the figures in this `document` by those of the last run in --out")
	flag.BoolVar(&o.list, "list", false, "list the cases, and what each should come to")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "`seed` of the order in which the ways take turns")
	flag.Parse()
	if o.quick && *pools == "" {
		*pools = "ram-xfs|disk-btrfs"
	}
	var errs [2]error
	o.cases, errs[0] = regexp.Compile(*cases)
	o.pools, errs[1] = regexp.Compile(*pools)
	if err := errors.Join(errs[:]...); err != nil || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "bench: arguments are not understood:", flag.Args(), err)
		flag.Usage()
		os.Exit(2)
	}
	return o
}

func main() {
	o := parse()
	if o.list {
		list(os.Stdout)
		return
	}
	if o.quote != "" {
		if err := quoteIn(o.quote, filepath.Join(o.out, jsonName)); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %v\n", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	run := supervise
	if os.Getenv(workEnv) != "" {
		run = measure
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// supervise runs this program again, in a mount namespace of its own, and removes what that leaves.
func supervise(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, because it mounts: run `make bench`")
	}
	dir, err := os.MkdirTemp(o.dir, "csi-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanUp(dir)) }()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), workEnv+"="+dir, "PATH="+os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNS, // and makes all mounts private
		Setpgid:      true,                // Ctrl-C is for this process, which passes it on
		Pdeathsig:    syscall.SIGTERM,
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	pass := context.AfterFunc(ctx, func() {
		fmt.Fprintf(os.Stderr, "bench: stopping: %v\n", context.Cause(ctx))
		cmd.Process.Signal(syscall.SIGTERM)
	})
	defer pass()
	return cmd.Wait()
}

// cleanUp removes the directory of a run whose mounts are gone with their namespace, and the loop devices on its files.
// The kernel detaches the last autoclear devices a moment after the namespace has ended.
func cleanUp(dir string) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left, err := detachBelow(dir)
		if err == nil && left == 0 {
			return os.RemoveAll(dir)
		}
		if time.Now().After(end) {
			return errors.Join(err, fmt.Errorf("left behind: %s, with %d loop devices on files in it", dir, left))
		}
	}
}

// measure is the second process.
func measure(ctx context.Context, o options) error {
	dir := os.Getenv(workEnv)
	if err := dropOthers(dir); err != nil {
		return err
	}
	b, err := newBench(o, dir)
	if err != nil {
		return err
	}
	err = b.run(ctx)
	if ctx.Err() != nil {
		err = fmt.Errorf("interrupted (%w); everything was removed", context.Cause(ctx))
	} else {
		err = errors.Join(err, b.write())
	}
	return errors.Join(err, os.RemoveAll(dir)) // the first process does so, too, if it is still there
}

// dropOthers takes the mounts of other programs' loop devices out of this mount namespace. A copy here would keep such a
// device busy after its program has unmounted it. Mounts on the way to the run's own directory stay.
func dropOthers(dir string) error {
	needed := []string{dir, "/usr/bin", "/boot", "/lib/modules"}
	for _, path := range []string{"/proc/self/exe", "/proc/self/cwd"} {
		if at, err := filepath.EvalSymlinks(path); err == nil {
			needed = append(needed, at)
		}
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		holds := func(path string) bool { return m.Mountpoint == "/" || strings.HasPrefix(path+"/", m.Mountpoint+"/") }
		if !strings.HasPrefix(m.Source, "/dev/loop") || slices.ContainsFunc(needed, holds) {
			continue
		}
		// One that is below another was dropped with it.
		if err := syscall.Unmount(m.Mountpoint, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			return fmt.Errorf("umount %s: %w", m.Mountpoint, err)
		}
	}
	return nil
}
