// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package testenv gives tests the real things: pools of every kind on loop
// devices, the product's binary, the formatting VM.
//
// Tests that use it are built with the tag "system". They need root and the
// packages that hack/setup.sh installs, and fail without them: such a test never skips.
package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/internal/loops"
)

// workDir is the directory for pools. It is on a real disk, not on a tmpfs.
const workDir = "/var/tmp"

// mkfs and similar programs are in directories that an ordinary user's PATH lacks, and
// `sudo env "PATH=$PATH"` passes that PATH on.
func init() {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/local/sbin:/usr/sbin:/sbin")
}

// Root fails a test that was not started by root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: run `make test`, or `sudo go test -tags system …`")
	}
}

// Dir makes a directory on a real disk, and removes it after the test.
//
// It is not removed while a loop device has one of its files. Then a mount of it is left in
// another mount namespace. Removing the directory below that mount would detach the mount with
// everything that is mounted on it (__detach_mounts in fs/namespace.c). A loopback pool among
// that and the file behind its device keep each other alive from then on, without a process
// that could be ended. Who has the device after all can free it: mount it, and remove the
// directory in it on which the pool was mounted.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(workDir, "csi-disktemplate-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left := settledLoops(t, dir); len(left) > 0 {
			t.Errorf("left behind: %s, with the loop devices %v on files in it; look for a mount namespace that has them mounted", dir, left)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("left behind: %v", err)
		}
	})
	return dir
}

// settledLoops is [LoopsBelow] after devices that are about to go have gone.
func settledLoops(t testing.TB, dir string) (left []string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(poll) {
		if left = LoopsBelow(t, dir); len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// Run runs a command and returns what it printed; a failure ends the test.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Try runs a command that may fail, and returns what it printed.
func Try(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// Fsck checks an unmounted image with the filesystem's own checker.
func Fsck(t testing.TB, filesystem, path string) {
	t.Helper()
	switch filesystem {
	case "ext4":
		Run(t, "e2fsck", "-fn", path)
	case "xfs":
		Run(t, "xfs_repair", "-n", "-f", path)
	case "btrfs":
		Run(t, "btrfs", "check", "--readonly", path)
	default:
		t.Fatalf("no checker for %q", filesystem)
	}
}

// Kind is a kind of filesystem for a pool. Some kinds cannot hold one.
type Kind struct {
	Name string
	mkfs []string
}

// The kinds. The first two can hold a pool.
var (
	XFS          = Kind{"xfs", []string{"mkfs.xfs", "-q", "-s", "size=4096"}}
	Btrfs        = Kind{"btrfs", []string{"mkfs.btrfs", "-q"}}
	XFSNoReflink = Kind{"xfs", []string{"mkfs.xfs", "-q", "-m", "reflink=0"}}
	Ext4         = Kind{"ext4", []string{"mkfs.ext4", "-q"}}
	// PoolKinds lists the kinds that can hold a pool.
	PoolKinds = []Kind{XFS, Btrfs}
)

// Mount makes a filesystem of the given size on a loop device, mounts it, and
// returns its path. After the test it is unmounted. The test must leave nothing mounted
// below it.
//
// A btrfs has all of its space from the start, as a disk has: a pool on a btrfs in a sparse file
// takes no thick volumes. A very large one is sparse all the same.
func (k Kind) Mount(t testing.TB, size int64) string {
	t.Helper()
	if k.Name == Btrfs.Name && size <= 8<<30 {
		return mount(t, Full(t, size, k.mkfs...), "loop,nodiscard")
	}
	return Mount(t, size, k.mkfs...)
}

// Full is [Image] for a file that has all of its space.
func Full(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	image := Image(t, size)
	Run(t, "fallocate", "--length", fmt.Sprint(size), image)
	// mkfs discards the whole device by default.
	Run(t, mkfs[0], append(slices.Clone(mkfs[1:]), "--nodiscard", image)...)
	return image
}

// Pool is [Kind.Mount] with a size that suits most tests.
func (k Kind) Pool(t testing.TB) string {
	t.Helper()
	return k.Mount(t, 512<<20)
}

// Image makes a sparse file of the given size, formats it unless mkfs is empty, and
// returns its path. mkfs is the command without the file's name.
func Image(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	image := filepath.Join(Dir(t), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	if len(mkfs) > 0 {
		Run(t, mkfs[0], append(slices.Clone(mkfs[1:]), image)...)
	}
	return image
}

// Format makes a file with a filesystem of the given size at a path.
func (k Kind) Format(t testing.TB, path string, size int64) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	Run(t, k.mkfs[0], append(slices.Clone(k.mkfs[1:]), path)...)
}

// Mount makes an [Image], mounts it, and returns its path.
func Mount(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	return mount(t, Image(t, size, mkfs...), "loop")
}

func mount(t testing.TB, image, options string) string {
	t.Helper()
	Root(t)
	at := filepath.Join(filepath.Dir(image), "fs")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	Run(t, "mount", "-o", options, image, at)
	t.Cleanup(func() { Unmount(t, at) })
	return at
}

// Tmpfs mounts a tmpfs and returns its path.
func Tmpfs(t testing.TB) string {
	t.Helper()
	Root(t)
	at := Dir(t)
	Run(t, "mount", "-t", "tmpfs", "test", at)
	t.Cleanup(func() { Unmount(t, at) })
	return at
}

// DropOthers is the beginning of a shell script that runs in a mount namespace of its own and
// lives on. The namespace has copies of all mounts, which keep the volumes of other tests
// alive after they were unmounted: their devices stay attached, and deleting them is refused.
// So it drops all mounts of tests but those below the directories that are kept.
func DropOthers(keep ...string) string {
	patterns := "-"
	for _, dir := range keep {
		patterns += "|" + dir + "|" + dir + "/*"
	}
	return `for at in $(cut -d" " -f5 /proc/self/mountinfo); do case $at in ` + patterns + `) ;; ` + workDir + `/*) umount -l "$at" 2>/dev/null ;; esac; done; `
}

// DropOthersHere does the same for a thread in a mount namespace of its own.
func DropOthersHere(keep ...string) error {
	table, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	defer table.Close()
	mounts, err := mountinfo.GetMountsFromReader(table, mountinfo.PrefixFilter(workDir))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if slices.ContainsFunc(keep, func(dir string) bool { return m.Mountpoint == dir || strings.HasPrefix(m.Mountpoint, dir+"/") }) {
			continue
		}
		// One that is below another was dropped with it.
		if err := syscall.Unmount(m.Mountpoint, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

// ownDev are the nodes that a container has in a /dev of its own: a shell script that makes them in a mount namespace of
// its own. No loop device is among them, so that whoever opens one there fails, whichever it is.
const ownDev = "mount -t tmpfs -o mode=755 tmpfs /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9 && "

// OwnDev returns a command that runs another one as on a node of kind or minikube: in a mount
// namespace of its own, where /dev is a tmpfs in which new loop devices do not appear. The
// arguments of the other command follow. Mounts of tests are dropped but those below the
// directories that are kept.
func OwnDev(keep ...string) []string {
	return []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", DropOthers(keep...) + ownDev + `exec "$@"`, "sh"}
}

// OnThread runs a function on a thread that ends with it, and with the thread what the function
// has changed of it: its mount namespace, its capabilities. The function must not start
// goroutines. It may end with [runtime.Goexit], as t.Fatal does, although that ends no test there.
//
// The main thread of a Go process never ends, and would keep a mount namespace until the process
// does.
func OnThread(run func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if syscall.Gettid() == syscall.Getpid() {
			defer runtime.UnlockOSThread() // while this goroutine holds it, run gets another one
			OnThread(run)
			return
		}
		run()
	}()
	<-done
}

// InOwnDev is [OwnDev] for a function, on a thread as [OnThread] has it.
func InOwnDev(t testing.TB, run func()) {
	t.Helper()
	OnThread(func() {
		err := syscall.Unshare(syscall.CLONE_FS | syscall.CLONE_NEWNS)
		if err == nil {
			err = syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SLAVE, "")
		}
		if err == nil {
			err = DropOthersHere()
		}
		if err == nil {
			err = syscall.Mount("tmpfs", "/dev", "tmpfs", 0, "")
		}
		if err != nil {
			t.Error(err)
			return
		}
		run()
	})
}

const (
	// patience is how long something that is about to go may take. The kernel acts on a last
	// close at once, but on a node udev may hold any block device open for a moment, and a
	// process that is being started has a copy of the mount table. Where many tests run at once,
	// that takes seconds. Only a failure lasts that long.
	patience = 30 * time.Second
	poll     = 5 * time.Millisecond
)

// Eventually waits until ok returns true.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(poll) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain for %s", patience, what)
		}
	}
}

// insist is [Try] again and again, until the command succeeds or patience ends. It is for what the
// kernel refuses with EBUSY. The plugin ends deleted volumes after its answer, and a mount
// namespace that copied their mounts keeps their loop devices for some milliseconds: see [Umount].
// Each keeps the filesystem busy that its backing file is on.
func insist(name string, args ...string) (out string, err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(poll) {
		out, err = Try(name, args...)
		if err == nil || time.Now().After(deadline) {
			return out, err
		}
	}
}

// ReadOnly mounts a filesystem read-only that is mounted. The kernel refuses that while a file of it is
// open for writing, or is open and has no name (sb_prepare_remount_readonly in fs/namespace.c).
// ReadOnly waits for files that are about to be closed.
func ReadOnly(t testing.TB, at string) {
	t.Helper()
	if out, err := insist("mount", "-o", "remount,ro", at); err != nil {
		t.Fatalf("mounting %s read-only: %v\n%s", at, err, out)
	}
}

// Unmount unmounts a mount, and what a failed test left below it. It waits while the mount is busy.
func Unmount(t testing.TB, at string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(at))
	if err != nil {
		t.Error(err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if m := mounts[i].Mountpoint; m != at {
			t.Errorf("the test left %s mounted", m)
			exec.Command("umount", m).Run()
		}
	}
	if out, err := insist("umount", at); err != nil {
		t.Errorf("umount %s: %v\n%s", at, err, out)
		exec.Command("umount", "--lazy", at).Run() // leave nothing behind, even if something holds it
	}
}

// Umount unmounts a loop mount and waits until its superblock is gone too. The mount may be busy
// for a moment. The superblock may stay longer: a mount namespace that copied the mount keeps it
// alive, and tests that run at the same time make such namespaces for some milliseconds.
func Umount(t testing.TB, at string) {
	t.Helper()
	source := strings.TrimSpace(Run(t, "findmnt", "-n", "-o", "SOURCE", "--mountpoint", at))
	name := filepath.Join("/sys/block", filepath.Base(source), "loop/backing_file")
	backing, err := os.ReadFile(name)
	if out, err := insist("umount", at); err != nil {
		t.Fatalf("umount %s: %v\n%s", at, err, out)
	}
	if err == nil {
		Eventually(t, "the superblock of "+at+" to go", func() bool {
			now, err := os.ReadFile(name)
			return err != nil || !bytes.Equal(now, backing)
		})
	}
}

// Sweep removes what a failed test has left of volumes: mounts below the kubelet's
// directory, and loop devices of files in the pool. A mount is an error of the test.
func Sweep(t testing.TB, kubelet, pool string) {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(kubelet))
	if err != nil {
		t.Error(err)
	}
	for _, m := range slices.Backward(mounts) {
		t.Errorf("the test left %s mounted", m.Mountpoint)
		exec.Command("umount", m.Mountpoint).Run()
	}
	for _, name := range LoopsBelow(t, pool) { // autoclear devices went with their mounts
		exec.Command("losetup", "-d", "/dev/"+name).Run()
	}
}

// NoLoopsBelow waits until no loop device has its file in a directory.
func NoLoopsBelow(t testing.TB, dir string) {
	t.Helper()
	Eventually(t, "the loop devices of files in "+dir+" to go", func() bool { return len(LoopsBelow(t, dir)) == 0 })
}

// IsMounted reports whether something is mounted at a path.
func IsMounted(t testing.TB, at string) bool {
	t.Helper()
	mounted, err := mountinfo.Mounted(at)
	if err != nil {
		t.Fatal(err)
	}
	return mounted
}

// Mounts counts the mounts below a directory.
func Mounts(t testing.TB, below string) int {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(below))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range mounts {
		if m.Mountpoint != below {
			n++
		}
	}
	return n
}

// LoopsBelow lists the loop devices whose backing file is, or was, in a directory, without /dev. Devices that others
// attach never count, see package loops.
func LoopsBelow(t testing.TB, dir string) []string {
	t.Helper()
	devices, err := loops.Below(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range devices {
		names = append(names, d.Name)
	}
	return names
}

// Fill takes all the free space of a filesystem.
func Fill(t testing.TB, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var at int64
	for size := int64(1) << 30; size >= 4096; size /= 2 {
		for syscall.Fallocate(int(f.Fd()), 0, at, size) == nil {
			at += size
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

var (
	build        = sync.OnceValues(func() (string, error) { return buildAs("csi-disktemplate", "0") })
	buildFailing = sync.OnceValues(func() (string, error) {
		return buildAs("csi-disktemplate-failpoints", "0", "-tags", "failpoints")
	})
	buildRacing = sync.OnceValues(func() (string, error) {
		return buildAs("csi-disktemplate-race", "1", "-race", "-tags", "failpoints")
	})
)

func buildAs(name, cgo string, flags ...string) (string, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(strings.TrimSpace(string(root)), "bin", "test")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Several test binaries may build at once. Each renames its own file into place, and all
	// files are the same.
	tmp, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, name)
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-o", out}, flags...)
	cmd := exec.Command("go", append(args, "github.com/csi-disktemplate/csi-disktemplate/cmd/csi-disktemplate")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, stderr.Bytes())
	}
	final := filepath.Join(dir, name)
	return final, os.Rename(out, final)
}

// Binary builds the product as users get it and returns its path.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatalf("building the product: %v", err)
	}
	return path
}

// FailingBinary builds the product with the failpoints of internal/failpoint and returns
// its path. race adds the race detector, with which it takes some seconds longer to start.
func FailingBinary(t testing.TB, race bool) string {
	t.Helper()
	build := buildFailing
	if race {
		build = buildRacing
	}
	path, err := build()
	if err != nil {
		t.Fatalf("building the product: %v", err)
	}
	return path
}

// CacheDir returns the directory in which tests keep the unpacked kernel between runs.
func CacheDir(t testing.TB) string {
	t.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "csi-disktemplate-test")
}
