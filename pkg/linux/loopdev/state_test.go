//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// left is state that a device keeps when it is detached, and how others set it.
type left struct {
	readOnly   bool
	writeCache string
	discard    string
}

var leftovers = map[string]left{
	"read-only":           {readOnly: true},
	"write through":       {writeCache: "write through"},
	"no discards":         {discard: "0"},
	"small discards":      {discard: "65536"},
	"all of it":           {readOnly: true, writeCache: "write through", discard: "65536"},
	"all, no discards":    {readOnly: true, writeCache: "write through", discard: "0"},
	"nothing":             {},
	"as a thick volume's": {discard: "0", writeCache: "write back"},
}

// leave sets the state of a device and detaches it as other programs do, so that no program
// finds the device free in this state before the test does.
func (l left) leave(t *testing.T, f *os.File) int {
	t.Helper()
	d := attach(t, new(Allocator), f, Options{})
	write := func(name, value string) {
		if value == "" {
			return
		}
		if err := os.WriteFile(d.queue(name), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	write("write_cache", l.writeCache)
	write("discard_max_bytes", l.discard)
	fd := int(d.File().Fd())
	if l.readOnly {
		if err := unix.IoctlSetPointerInt(fd, unix.BLKROSET, 1); err != nil {
			t.Fatal(err)
		}
	}
	_, err := unix.IoctlRetInt(fd, unix.LOOP_CLR_FD)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	return d.Index()
}

// identity tells a device from another that later has the same number: it is the inode of
// its directory in sysfs.
func identity(t *testing.T, index int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/sys/block/loop%d/", index), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func number(t *testing.T, d *Device, name string) uint64 {
	t.Helper()
	n, err := d.number(name)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestStateOfOthers: what somebody left on a device does not reach the next file.
func TestStateOfOthers(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	theirs, f := image(t, filepath.Join(dir, "theirs")), image(t, filepath.Join(dir, "file"))
	for name, l := range leftovers {
		for _, readOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, read-only %v", name, readOnly), func(t *testing.T) {
				index := l.leave(t, theirs)
				was := identity(t, index)
				a := Allocator{nodes: 1000, free: []int{index}}
				d := attach(t, &a, f, Options{ReadOnly: readOnly})
				want := map[string]string{"ro": "0", "queue/write_cache": "write back"}
				if readOnly {
					want["ro"] = "1"
					delete(want, "queue/write_cache") // there is nothing to flush
				}
				for name, want := range want {
					if got := sysfs(t, d, name); got != want {
						t.Errorf("%s is %s, want %s", name, got, want)
					}
				}
				if got, want := number(t, d, "discard_max_bytes"), number(t, d, "discard_max_hw_bytes"); got+BlockSize <= want {
					t.Errorf("discards of %d bytes are accepted, want %d", got, want)
				}
				if is, err := d.ReadOnly(); err != nil || is != readOnly {
					t.Errorf("ReadOnly: %v, %v", is, err)
				}
				_, err := d.File().WriteAt(make([]byte, BlockSize), 0)
				if readOnly != errors.Is(err, unix.EPERM) || !readOnly && err != nil {
					t.Errorf("a write: %v", err)
				}
				if err := d.Detach(); err != nil {
					t.Error(err)
				}
				// Without a granularity a device never accepts discards again, and is removed. The
				// next one may get its number.
				if again := identity(t, d.Index()) == was; again != (l.discard != "0") {
					t.Errorf("the device was used again: %v", again)
				}
				if got := sysfs(t, d, "ro"); got != "0" {
					t.Errorf("%s is left read-only to the next program", d.Path())
				}
			})
		}
	}
}

// TestPrepare: a device that is attached already gets the state that it needs.
func TestPrepare(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "file"))
	d := attach(t, new(Allocator), f, Options{})
	if err := os.WriteFile(d.queue("write_cache"), []byte("write through"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.setReadOnlyBit(true); err != nil {
		t.Fatal(err)
	}
	o := Options{NoDiscard: true} // last, as it stays
	for _, o := range []Options{{ReadOnly: true}, {}, o} {
		if err := d.Prepare(o); err != nil {
			t.Fatal(err)
		}
		if is, err := d.ReadOnly(); err != nil || is != o.ReadOnly {
			t.Errorf("read-only: %v, want %v: %v", is, o.ReadOnly, err)
		}
		if got := sysfs(t, d, "queue/write_cache"); got != "write back" && !o.ReadOnly {
			t.Errorf("the write cache is in mode %q", got)
		}
		if refuses := sysfs(t, d, "queue/discard_max_bytes") == "0"; refuses != o.NoDiscard {
			t.Errorf("the device refuses discards: %v, want %v", refuses, o.NoDiscard)
		}
	}
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if err := Remove(d.Index()); err != nil {
		t.Fatal(err)
	}
}

// TestDropFlushes attaches one device in turn for files whose flushes count and for files whose
// flushes are dropped. What a file gets does not depend on the one before it.
func TestDropFlushes(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "file"))
	index, err := add()
	if err != nil {
		t.Fatal(err)
	}
	defer Remove(index)
	want := map[bool]string{false: "write back", true: "write through"}
	is := func(d *Device, drops bool) {
		t.Helper()
		if got := sysfs(t, d, "queue/write_cache"); got != want[drops] {
			t.Errorf("the write cache has the mode %q, want %q", got, want[drops])
		}
		if n := syncedWrites(t, d); (n == 0) != drops {
			t.Errorf("%d flushes reached the file of a device that drops them: %v", n, drops)
		}
	}
	for _, drops := range []bool{true, false, true, true, false, false} {
		for _, autoClear := range []bool{true, false} {
			d, err := attachIfFree(index, f, Options{DropFlushes: drops, AutoClear: autoClear})
			if err != nil {
				t.Fatal(err)
			}
			is(d, drops)
			end := d.Detach
			if autoClear {
				end = d.Close
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, "the device to be detached", func() bool { return !attached(index) })
		}
	}
	d, err := attachIfFree(index, f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Detach()
	for _, drops := range []bool{true, false} {
		if err := d.Prepare(Options{DropFlushes: drops}); err != nil {
			t.Fatal(err)
		}
		is(d, drops)
	}
}

// syncedWrites writes to a device and syncs it, some times, and returns how many flushes reached
// its file: the 16th number in Documentation/ABI/stable/sysfs-block, stat.
func syncedWrites(t *testing.T, d *Device) int {
	t.Helper()
	before := flushed(t, d)
	w, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for range 3 {
		_, err := w.WriteAt(make([]byte, BlockSize), 0)
		if err := errors.Join(err, w.Sync()); err != nil {
			t.Fatal(err)
		}
	}
	return flushed(t, d) - before
}

func flushed(t *testing.T, d *Device) int {
	t.Helper()
	fields := strings.Fields(sysfs(t, d, "stat"))
	if len(fields) < 16 {
		t.Fatalf("stat of %s has only %d fields", d.Path(), len(fields))
	}
	n, err := strconv.Atoi(fields[15])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestReadOnlyWhileHeld: a reader that still holds a detached device cannot write to it.
func TestReadOnlyWhileHeld(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "file"))
	d := attach(t, new(Allocator), f, Options{ReadOnly: true})
	reader, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := d.Detach(); err != nil {
		t.Fatal(err)
	}
	if _, err := reader.WriteAt(make([]byte, BlockSize), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("a write to a detached device that a reader holds: %v", err)
	}
	reader.Close()
	testenv.Eventually(t, "the device to be detached", func() bool { return !attached(d.Index()) })
	again := attach(t, &Allocator{nodes: 1000, free: []int{d.Index()}}, f, Options{})
	if got := sysfs(t, again, "ro"); got != "0" {
		t.Errorf("after a reader held %s, ro of %s is %s", d.Path(), again.Path(), got)
	}
}

// TestOldReadOnly: earlier versions attached devices for readers with LO_FLAGS_READ_ONLY.
func TestOldReadOnly(t *testing.T) {
	f := image(t, filepath.Join(testenv.XFS.Pool(t), "file"))
	index, err := add()
	if err != nil {
		t.Fatal(err)
	}
	old, err := openNode(index, unix.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	if err := old.configure(f, Options{}); err != nil {
		t.Fatal(err)
	}
	defer Remove(index)
	if is, err := old.ReadOnly(); err != nil || !is {
		t.Errorf("ReadOnly of a device that was attached read-only: %v, %v", is, err)
	}
	if err := old.Prepare(Options{ReadOnly: true}); err != nil {
		t.Error(err)
	}
	if err := old.Prepare(Options{}); !errors.Is(err, errUnfit) {
		t.Errorf("a device that was attached read-only, for a writer: %v", err)
	}
	if err := old.Detach(); err != nil {
		t.Error(err)
	}
}

// BenchmarkPrepare is what the state of a device costs an attachment when it is right already,
// beside what one of its three attributes costs through package os.
func BenchmarkPrepare(b *testing.B) {
	d := attach(b, new(Allocator), image(b, filepath.Join(testenv.XFS.Pool(b), "file")), Options{})
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			if err := d.prepare(Options{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("one by os.ReadFile", func(b *testing.B) {
		for b.Loop() {
			if _, err := os.ReadFile(d.queue("discard_max_bytes")); err != nil {
				b.Fatal(err)
			}
		}
	})
}
