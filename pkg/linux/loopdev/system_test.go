//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
)

// image makes a file to attach. Its name vanishes with the pool.
func image(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(16 << 20); err != nil {
		t.Fatal(err)
	}
	return f
}

func attach(t testing.TB, a *Allocator, f *os.File, o Options) *Device {
	t.Helper()
	d, err := a.Attach(f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Detach() })
	return d
}

func sysfs(t testing.TB, d *Device, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

var pools = map[string]func(testing.TB) string{
	"btrfs": testenv.Btrfs.Pool,
	"xfs":   testenv.XFS.Pool,
	"xfs with sectors of 512 bytes": func(t testing.TB) string {
		return testenv.Mount(t, 512<<20, "mkfs.xfs", "-q", "-s", "size=512", "-m", "reflink=1")
	},
}

func TestAttach(t *testing.T) {
	for name, pool := range pools {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			template := image(t, filepath.Join(dir, "template"))
			if _, err := template.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
				t.Fatal(err)
			}
			// The file is reflinked: xfs has rules of its own for direct I/O on such files.
			f := image(t, filepath.Join(dir, "clone"))
			if err := reflink.Clone(f, template); err != nil {
				t.Fatal(err)
			}
			d := attach(t, new(Allocator), f, Options{Name: strings.Repeat("n", 100)})
			for name, want := range map[string]string{
				"loop/dio":                 "1",
				"loop/autoclear":           "0",
				"queue/logical_block_size": "4096",
				"size":                     "32768",
				"ro":                       "0",
			} {
				if got := sysfs(t, d, name); got != want {
					t.Errorf("%s is %s, want %s", name, got, want)
				}
			}
			status, err := d.status()
			if err != nil {
				t.Fatal(err)
			}
			if got, want := unix.ByteSliceToString(status.File_name[:]), strings.Repeat("n", 63); got != want {
				t.Errorf("lo_file_name is %q, want %q", got, want)
			}
			if _, err := d.File().WriteAt(bytes.Repeat([]byte{2}, 8192), 4096); err != nil {
				t.Fatal(err)
			}
			if err := d.File().Sync(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 1)
			if _, err := f.ReadAt(got, 8192); err != nil || got[0] != 2 {
				t.Errorf("the write did not reach the file: %v, %v", got, err)
			}
			if err := d.Detach(); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
		})
	}
}

// TestAttachRefusesBufferedIO uses blocks of 16 KiB: a write to a shared extent then takes
// 16 KiB or more, so direct I/O in blocks of 4 KiB is not possible.
func TestAttachRefusesBufferedIO(t *testing.T) {
	dir := testenv.Mount(t, 512<<20, "mkfs.xfs", "-q", "-b", "size=16384", "-s", "size=4096", "-m", "reflink=1")
	template := image(t, filepath.Join(dir, "template"))
	if _, err := template.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	f := image(t, filepath.Join(dir, "clone"))
	if err := reflink.Clone(f, template); err != nil {
		t.Fatal(err)
	}
	_, err := new(Allocator).Attach(f, Options{})
	if !errors.Is(err, ErrNotDirect) {
		t.Fatal(err)
	}
	t.Log(err)
	if found, err := Find(f); len(found) > 0 || err != nil {
		t.Errorf("the file stayed attached to %v: %v", found, err)
	}
}

func TestAttachReadOnlyAndReuse(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	f := image(t, filepath.Join(dir, "f"))
	var a Allocator
	d := attach(t, &a, f, Options{ReadOnly: true})
	if got := sysfs(t, d, "ro"); got != "1" {
		t.Errorf("ro is %s", got)
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	// This allocator knows only the device that was read-only.
	b := Allocator{nodes: 1000, free: []int{d.Index()}}
	d2 := attach(t, &b, f, Options{})
	if got := sysfs(t, d2, "ro"); got != "0" || d2.Index() != d.Index() {
		t.Errorf("loop%d after loop%d: ro is %s", d2.Index(), d.Index(), got)
	}
	if _, err := d2.File().WriteAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}

	readOnly, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	if _, err := a.Attach(readOnly, Options{}); err == nil || !strings.Contains(err.Error(), "not open for writing") {
		t.Errorf("a writable device over a read-only file: %v", err)
	}
}

func TestAutoClear(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "f"))
	d := attach(t, new(Allocator), f, Options{AutoClear: true})
	other, err := Open(d.Index())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if !attached(other.Index()) {
		t.Fatal("the device was detached while it was open")
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the autoclear device to be detached", func() bool { return !attached(other.Index()) })
	if _, err := Open(other.Index()); !errors.Is(err, ErrNotAttached) {
		t.Errorf("Open after autoclear: %v", err)
	}
}

func TestCloseLeavesItAttached(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "f"))
	d := attach(t, new(Allocator), f, Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(d.Index())
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := again.Backs(f); !ok || err != nil {
		t.Errorf("Backs: %v, %v", ok, err)
	}
	if err := again.Detach(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
}

// TestInUse asks for a device that is open, and mounted for a while.
func TestInUse(t *testing.T) {
	d := attach(t, new(Allocator), image(t, filepath.Join(testenv.XFS.Pool(t), "f")), Options{})
	testenv.Run(t, "mkfs.ext4", "-q", d.Path())
	is := func(want bool) {
		t.Helper()
		if got, err := d.InUse(); got != want || err != nil {
			t.Errorf("InUse is %v, want %v: %v", got, want, err)
		}
	}
	is(false)
	at := t.TempDir()
	testenv.Run(t, "mount", d.Path(), at)
	is(true)
	testenv.Run(t, "umount", at)
	is(false)
}

func TestFind(t *testing.T) {
	for name, pool := range pools {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			if name == "btrfs" { // a subvolume has its own st_dev
				dir = filepath.Join(dir, "subvolume")
				testenv.Run(t, "btrfs", "-q", "subvolume", "create", dir)
			}
			fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fd), "unnamed")
			defer f.Close()
			if err := f.Truncate(16 << 20); err != nil {
				t.Fatal(err)
			}
			other := image(t, filepath.Join(dir, "other"))
			var a Allocator
			attach(t, &a, other, Options{})
			d := attach(t, &a, f, Options{AutoClear: true})
			check := func(when string, want ...int) {
				t.Helper()
				got, err := Find(f)
				slices.Sort(got)
				slices.Sort(want)
				if err != nil || !slices.Equal(got, want) {
					t.Errorf("%s: found %v, want %v: %v", when, got, want, err)
				}
			}
			check("unnamed", d.Index())
			path := filepath.Join(dir, "linked")
			if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
				t.Fatal(err)
			}
			if name := sysfs(t, d, "loop/backing_file"); !strings.HasSuffix(name, "(deleted)") {
				t.Errorf("backing_file is %q, without the (deleted) that the package comment says", name)
			}
			check("linked", d.Index())
			if err := os.Rename(path, path+"2"); err != nil {
				t.Fatal(err)
			}
			check("renamed", d.Index())
			byName, err := os.Open(path + "2")
			if err != nil {
				t.Fatal(err)
			}
			defer byName.Close()
			if ok, err := d.Backs(byName); !ok || err != nil {
				t.Errorf("Backs of the file, opened by its new name: %v, %v", ok, err)
			}
			if ok, err := d.Backs(other); ok || err != nil {
				t.Errorf("Backs of another file: %v, %v", ok, err)
			}
			if err := os.Remove(path + "2"); err != nil {
				t.Fatal(err)
			}
			check("removed", d.Index())
			second := attach(t, &a, f, Options{ReadOnly: true})
			check("attached twice", d.Index(), second.Index())
			if err := errors.Join(second.Detach(), d.Close()); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, "the device to be detached", func() bool { return !attached(second.Index()) && !attached(d.Index()) })
			check("detached")
		})
	}
}

// TestAttachPassesOverTakenDevices: other processes attach to devices that were free at
// the last look.
func TestAttachPassesOverTakenDevices(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	f := image(t, filepath.Join(dir, "f"))
	d := attach(t, new(Allocator), image(t, filepath.Join(dir, "theirs")), Options{})
	const removed = 1 << 19
	a := Allocator{nodes: 1000, free: append(slices.Repeat([]int{d.Index()}, tries), removed)}
	mine := attach(t, &a, f, Options{})
	if mine.Index() == d.Index() {
		t.Fatal("a device was attached that another process has")
	}
	if len(a.trying) != 0 {
		t.Errorf("after Attach these devices are still marked as tried: %v", a.trying)
	}
	if err := d.configure(f, Options{}); !errors.Is(err, errTaken) {
		t.Errorf("LOOP_CONFIGURE of a device that is taken: %v", err)
	}
}

const devices, workers = 64, 8

func TestAttachConcurrently(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	files := images(t, dir, devices)
	var a Allocator
	for range 3 {
		attached, err := attachAll(files, a.Attach)
		if err != nil {
			t.Error(err)
		}
		seen := map[int]bool{}
		for i, d := range attached {
			if d == nil {
				continue
			}
			if ok, err := d.Backs(files[i]); !ok || err != nil || seen[d.Index()] {
				t.Errorf("%s has its file: %v, and was given out before: %v; %v", d.Path(), ok, seen[d.Index()], err)
			}
			seen[d.Index()] = true
		}
		if err := detachAll(attached); err != nil {
			t.Error(err)
		}
	}
}

// TestDevicesAreUsedAgain attaches and detaches while many devices stay attached. The
// number of devices must not grow with time, since nobody removes them.
func TestDevicesAreUsedAgain(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	files := images(t, dir, devices)
	var a Allocator
	stay, err := attachAll(files[:48], a.Attach)
	defer detachAll(stay)
	if err != nil {
		t.Fatal(err)
	}
	before, err := existing()
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		d, err := a.Attach(files[63], Options{AutoClear: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	after, err := existing()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d devices, then %d", len(before), len(after))
	// A quarter is the bound of the allocator. 16 more are for other tests that run now.
	if limit := len(before)*5/4 + 16; len(after) > limit {
		t.Errorf("%d devices became %d, want at most %d", len(before), len(after), limit)
	}
}

// TestGivenBack: a device that detached itself is used again without a look at all devices. One
// that was to stay attached is not, since a pod may have its node.
func TestGivenBack(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "f"))
	a := Allocator{nodes: 1000} // as if it had just looked, and found none
	gone := func(d *Device, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, "the device to be detached", func() bool {
			other, err := Open(d.Index())
			if err == nil {
				other.Close()
			}
			return errors.Is(err, ErrNotAttached)
		})
	}
	first := attach(t, &a, f, Options{AutoClear: true})
	gone(first, first.Close())
	if !slices.Equal(a.free, []int{first.Index()}) {
		t.Fatalf("loop%d was not given back: %v", first.Index(), a.free)
	}
	second := attach(t, &a, f, Options{AutoClear: true})
	if second.Index() != first.Index() {
		t.Errorf("loop%d was attached, and loop%d is free", second.Index(), first.Index()) // or taken by another program
	}
	if err := second.Keep(); err != nil {
		t.Fatal(err)
	}
	gone(second, second.Detach())
	third := attach(t, &a, f, Options{})
	gone(third, third.Detach())
	fourth := attach(t, &a, f, Options{AutoClear: true, NoDiscard: true})
	gone(fourth, fourth.Close())
	if len(a.free) > 0 {
		t.Errorf("%v were given back, which were kept or refuse discards", a.free)
	}
	for _, d := range []*Device{second, third, fourth} {
		if err := Remove(d.Index()); err != nil {
			t.Error(err)
		}
	}
}

// TestGivenDevicesAreNotFree: a pod can detach the file of its device. The device must not
// get the next volume then, which the pod could use.
func TestGivenDevicesAreNotFree(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	d := attach(t, new(Allocator), image(t, filepath.Join(dir, "image")), Options{})
	at := filepath.Join(testenv.Dir(t), "node")
	if err := os.WriteFile(at, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "mount", "--bind", d.Path(), at)
	mounted := true
	defer func() {
		if mounted {
			testenv.Run(t, "umount", at)
		}
	}()
	pod, err := os.OpenFile(at, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = unix.IoctlRetInt(int(pod.Fd()), unix.LOOP_CLR_FD)
	if err := errors.Join(err, pod.Close()); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
	isFree := func() bool {
		var a Allocator
		if err := a.look(); err != nil {
			t.Fatal(err)
		}
		return slices.Contains(a.free, d.Index())
	}
	if isFree() {
		t.Errorf("%s counts as free while its node is mounted at %s", d.Path(), at)
	}
	testenv.Run(t, "umount", at)
	mounted = false
	if !isFree() && !attached(d.Index()) { // another process may have taken it
		t.Errorf("%s does not count as free after its node was unmounted", d.Path())
	}
}

func images(t testing.TB, dir string, n int) (files []*os.File) {
	for i := range n {
		files = append(files, image(t, filepath.Join(dir, fmt.Sprint("image", i))))
	}
	return files
}

func attachAll(files []*os.File, one func(*os.File, Options) (*Device, error)) ([]*Device, error) {
	all := make([]*Device, len(files))
	errs := make([]error, len(files))
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				all[i], errs[i] = one(files[i], Options{AutoClear: true})
			}
		})
	}
	for i := range files {
		next <- i
	}
	close(next)
	wg.Wait()
	return all, errors.Join(errs...)
}

func detachAll(all []*Device) error {
	var errs []error
	for _, d := range all {
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	return errors.Join(errs...)
}

// BenchmarkAttach attaches 64 files from 8 goroutines: with an Allocator, and with
// LOOP_CTL_GET_FREE and a retry on EBUSY, as losetup(8) does it.
func BenchmarkAttach(b *testing.B) {
	files := images(b, testenv.XFS.Pool(b), devices)
	var a Allocator
	b.Run("Allocator", func(b *testing.B) {
		benchmark(b, files, a.Attach)
	})
	b.Run("LOOP_CTL_GET_FREE", func(b *testing.B) {
		control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer control.Close()
		var mu sync.Mutex
		var busy int
		benchmark(b, files, func(f *os.File, o Options) (*Device, error) {
			for {
				i, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
				if err != nil {
					return nil, err
				}
				d, err := openNode(i, unix.O_RDWR)
				if err != nil {
					return nil, err
				}
				if err = d.configure(f, o); err == nil {
					return d, d.verify(f)
				}
				d.Close()
				if !errors.Is(err, errTaken) {
					return nil, err
				}
				mu.Lock()
				busy++
				mu.Unlock()
			}
		})
		b.ReportMetric(float64(busy)/float64(b.N), "EBUSY/op")
	})
	b.Run("one at a time", func(b *testing.B) {
		for b.Loop() {
			d, err := a.Attach(files[0], Options{})
			if err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := d.Detach(); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}

func benchmark(b *testing.B, files []*os.File, one func(*os.File, Options) (*Device, error)) {
	b.ReportAllocs()
	for b.Loop() {
		all, err := attachAll(files, one)
		b.StopTimer()
		if err := errors.Join(err, detachAll(all)); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkFind looks for the devices of one file while 1000 others are attached.
func BenchmarkFind(b *testing.B) {
	files := images(b, testenv.XFS.Pool(b), 1001)
	all, err := attachAll(files[1:], new(Allocator).Attach)
	defer detachAll(all)
	if err != nil {
		b.Fatal(err)
	}
	for want, name := range []string{"not attached", "attached"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if found, err := Find(files[want]); len(found) != want || err != nil {
					b.Fatal(found, err)
				}
			}
		})
	}
	b.Run("known", func(b *testing.B) {
		for b.Loop() {
			if found, err := Known(files[1]); len(found) != 1 || err != nil {
				b.Fatal(found, err)
			}
		}
	})
	b.Run("one of its devices", func(b *testing.B) {
		for b.Loop() {
			d, err := OpenBacked(files[1])
			if err != nil {
				b.Fatal(err)
			}
			d.Close()
		}
	})
}

// TestAlone: only a file that nobody else has open, and no loop device has, is alone. The
// descriptor that was attached counts like any other.
func TestAlone(t *testing.T) {
	for name, pool := range pools {
		t.Run(name, func(t *testing.T) {
			dir := pool(t)
			f := image(t, filepath.Join(dir, "f"))
			is := func(when string, want bool) {
				t.Helper()
				if got := alone(f); got != want {
					t.Errorf("%s: alone is %v, want %v", when, got, want)
				}
			}
			is("new", true)
			for _, flags := range []int{os.O_RDONLY, os.O_WRONLY, os.O_RDWR} {
				other, err := os.OpenFile(f.Name(), flags, 0)
				if err != nil {
					t.Fatal(err)
				}
				is(fmt.Sprintf("with flags %#x", flags), false)
				other.Close()
				is("closed", true)
			}
			d := attach(t, new(Allocator), f, Options{AutoClear: true})
			is("attached", false)
			at := filepath.Join(t.TempDir(), "at")
			testenv.Run(t, "mkfs.ext4", "-q", "-b", "4096", d.Path())
			if err := os.Mkdir(at, 0o700); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "mount", d.Path(), at)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			is("mounted", false)
			testenv.Umount(t, at)
			testenv.Eventually(t, "the file to be alone again", func() bool { return alone(f) })
			losetup := testenv.Run(t, "losetup", "--find", "--show", "--read-only", f.Name())
			is("attached by another program", false)
			if found, err := Find(f); err != nil || len(found) != 1 || pathOf(found[0]) != strings.TrimSpace(losetup) {
				t.Errorf("found %v, want %s: %v", found, losetup, err)
			}
			testenv.Run(t, "losetup", "--detach", strings.TrimSpace(losetup))
			testenv.Eventually(t, "the file to be alone again", func() bool { return alone(f) })
		})
	}
}

// TestLeaseDisturbsNobody opens a file again and again while its devices are looked for, as a
// sweep does.
func TestLeaseDisturbsNobody(t *testing.T) {
	dir, err := os.Open(testenv.XFS.Pool(t))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	f := image(t, filepath.Join(dir.Name(), "f"))
	var wg sync.WaitGroup
	for _, flags := range []int{unix.O_RDWR, unix.O_RDWR | unix.O_NONBLOCK, unix.O_RDONLY | unix.O_NONBLOCK} {
		wg.Go(func() {
			for range 1000 {
				other, err := openat.Open(dir, "f", flags)
				if err != nil {
					t.Errorf("flags %#x: %v", flags, err)
					return
				}
				other.Close()
			}
		})
	}
	opened := make(chan struct{})
	go func() { wg.Wait(); close(opened) }()
	proven := 0
	for {
		if alone(f) {
			proven++
		}
		select {
		case <-opened:
			if proven == 0 {
				t.Error("the file was never alone")
			}
			return
		default:
		}
	}
}

// TestKnown: devices that others attached before the first look are known, and those that this
// process attached since. What is gone is not.
func TestKnown(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	f := image(t, filepath.Join(dir, "f"))
	losetup := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", "--sector-size", "4096", f.Name()))
	theirs, _ := IndexOf(losetup)
	was := seen.isComplete()
	defer func() { seen.complete = was || seen.complete }()
	seen.complete = false
	known := func(when string, want ...int) {
		t.Helper()
		got, err := Known(f)
		slices.Sort(got)
		slices.Sort(want)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v: %v", when, got, want, err)
		}
	}
	known("first look", theirs)
	d := attach(t, new(Allocator), f, Options{ReadOnly: true})
	known("attached", theirs, d.Index())
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
	known("detached", theirs)
	testenv.Run(t, "losetup", "--detach", losetup)
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(theirs) })
	known("both detached")
	if _, err := OpenBacked(f); !errors.Is(err, ErrNotAttached) {
		t.Errorf("OpenBacked: %v", err)
	}
}

// TestFindBesideOthers looks for a device while other devices come and go.
func TestFindBesideOthers(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	create := func(name string) *os.File {
		f, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			err = f.Truncate(8 << 20)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	mine := create("mine")
	var allocator Allocator
	d, err := allocator.Attach(mine, Options{AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var wg sync.WaitGroup
	for w := range 4 {
		other := create(fmt.Sprintf("other-%d", w))
		wg.Go(func() {
			for i := range 50 {
				d, err := allocator.Attach(other, Options{AutoClear: i%2 == 0, NoDiscard: w == 0})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := d.File().WriteAt(make([]byte, 1<<20), 0); err != nil {
					t.Error(err)
				}
				end := d.Detach
				if i%2 == 0 {
					end = d.Close
				}
				if err := end(); err != nil {
					t.Error(err)
				}
				if w == 0 {
					if err := Remove(d.Index()); err != nil {
						t.Error(err)
					}
				}
			}
		})
		wg.Go(func() {
			for range 100 {
				if found, err := Find(mine); err != nil || len(found) != 1 || found[0] != d.Index() {
					t.Errorf("found %v, want %d: %v", found, d.Index(), err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestNoDiscard: a device that once refused discards never accepts them again, so it must
// not be used for another file.
func TestNoDiscard(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	path := filepath.Join(dir, "file")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 8<<20)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, ok := NodeIndex(f); ok {
		t.Error("NodeIndex takes a regular file for a node")
	}
	for range 2 {
		d, err := new(Allocator).Attach(f, Options{NoDiscard: true, Name: "of-the-test"})
		if err != nil {
			t.Fatal(err)
		}
		if limit := sysfs(t, d, "queue/discard_max_bytes"); limit != "0" {
			t.Errorf("the device accepts discards of %s bytes", limit)
		}
		if out, err := exec.Command("blkdiscard", "--force", d.Path()).CombinedOutput(); err == nil || !strings.Contains(string(out), "not supported") {
			t.Errorf("blkdiscard: %v %s", err, out)
		}
		if info, err := d.Info(); err != nil || info.Name != "of-the-test" {
			t.Errorf("the name is %q: %v", info.Name, err)
		}
		if file, err := BackingFile(d.Index()); err != nil || file != path {
			t.Errorf("the backing file is %q, want %q: %v", file, path, err)
		}
		if direct, err := Direct(d.Index()); err != nil || !direct {
			t.Errorf("direct I/O: %v, %v", direct, err)
		}
		if index, ok := NodeIndex(d.File()); !ok || index != d.Index() {
			t.Errorf("NodeIndex of %s: %d, %v", d.Path(), index, ok)
		}
		if err := Remove(d.Index()); err != nil {
			t.Errorf("removing a device in use: %v", err)
		}
		if err := d.Detach(); err != nil {
			t.Error(err)
		}
		// The device still refuses discards: the next attachment must not use it.
		only := Allocator{nodes: 1000, free: []int{d.Index()}}
		again := attach(t, &only, f, Options{})
		if limit := sysfs(t, again, "queue/discard_max_bytes"); limit == "0" {
			t.Errorf("%s refuses discards after %s", again.Path(), d.Path())
		}
		if err := again.Detach(); err != nil {
			t.Error(err)
		}
		if err := Remove(1 << 19); err != nil {
			t.Errorf("removing a device that is not there: %v", err)
		}
	}
}
