//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
)

// device attaches an image to a loop device.
func device(t testing.TB, mkfs ...string) *loopdev.Device {
	t.Helper()
	size := int64(16 << 20)
	if len(mkfs) > 0 && mkfs[0] != "mkfs.ext4" {
		size = 300 << 20
	}
	f, err := os.OpenFile(testenv.Image(t, size, mkfs...), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := new(loopdev.Allocator).Attach(f, loopdev.Options{AutoClear: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func mkfs(fs string) []string {
	switch fs {
	case "xfs":
		return []string{"mkfs.xfs", "-q", "-s", "size=4096"}
	case "btrfs":
		return []string{"mkfs.btrfs", "-q"}
	}
	return []string{"mkfs.ext4", "-q", "-b", "4096"} // small ones get blocks of 1 KiB, less than the device has
}

// target makes a file or directory to mount on, and unmounts what the test leaves there.
func target(t testing.TB, file bool) *os.File {
	t.Helper()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	path := filepath.Join(dir.Name(), "target")
	if file {
		err = os.WriteFile(path, []byte("below"), 0o600)
	} else {
		err = os.Mkdir(path, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := OpenTarget(dir, "target", 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.Close()
		for {
			if err := unmount(path); errors.Is(err, ErrNotMounted) {
				return
			} else if err != nil {
				t.Error(err)
				return
			}
		}
	})
	return f
}

func TestNewAttachUnmount(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			dev := device(t, mkfs(fs)...)
			attr := Attr{NoSUID: true, NoDev: true, NoExec: true, NoATime: true}
			d, err := New(Config{FSType: fs, Source: dev.Path(), Attr: attr})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			at := target(t, false)
			if m, err := At(at.Name()); m != nil || err != nil {
				t.Fatalf("mounted before Attach: %+v, %v", m, err)
			}
			// A detached mount can already be written to.
			file := create(t, d.File(), "file")
			file.Close()

			if err := d.Attach(at); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(at.Name(), "file")); err != nil {
				t.Error(err)
			}
			m, err := At(at.Name())
			if err != nil || m == nil {
				t.Fatalf("At: %+v, %v", m, err)
			}
			if m.FSType != fs || m.Source != dev.Path() || m.Attr != attr {
				t.Errorf("the mount is %+v, want %s on %s with %+v", m, fs, dev.Path(), attr)
			}
			if ok, err := IsMountPoint(d.File()); !ok || err != nil {
				t.Errorf("IsMountPoint of the mount: %v, %v", ok, err)
			}
			if ok, err := IsMountPoint(at); ok || err != nil {
				t.Errorf("IsMountPoint of the directory below it: %v, %v", ok, err)
			}
			err = unmount(at.Name())
			if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "fuser") {
				t.Errorf("Unmount while the descriptor is open: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if m, err := At(at.Name()); m == nil || err != nil {
				t.Errorf("after Close of an attached mount: %+v, %v", m, err)
			}
			if err := unmount(at.Name()); err != nil {
				t.Fatal(err)
			}
			if err := unmount(at.Name()); !errors.Is(err, ErrNotMounted) {
				t.Errorf("Unmount again: %v", err)
			}
		})
	}
}

func create(t testing.TB, dir *os.File, name string) *os.File {
	t.Helper()
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), name)
}

// TestCloseBeforeAttachUnmounts: Close ends a mount that was not attached, and with it
// the loop device.
func TestCloseBeforeAttachUnmounts(t *testing.T) {
	dev := device(t, mkfs("ext4")...)
	d, err := New(Config{FSType: "ext4", Source: dev.Path()})
	if err != nil {
		t.Fatal(err)
	}
	attached := func() bool {
		_, err := os.Stat("/sys/block/" + filepath.Base(dev.Path()) + "/loop")
		return err == nil
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if !attached() {
		t.Fatal("the mount does not hold its device")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, "the mount and its loop device to go", func() bool { return !attached() })
}

func TestReadOnlySuperblock(t *testing.T) {
	d, err := New(Config{FSType: "ext4", Source: device(t, mkfs("ext4")...).Path(), Data: []string{"ro", "errors=remount-ro"}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	_, err = unix.Openat(int(d.File().Fd()), "file", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if !errors.Is(err, unix.EROFS) {
		t.Errorf("create: %v", err)
	}
}

// TestFlagOption mounts with an option that has no value: nouuid, without which xfs refuses
// to mount the same UUID twice.
func TestFlagOption(t *testing.T) {
	dev := device(t, mkfs("xfs")...)
	d, err := New(Config{FSType: "xfs", Source: dev.Path(), Data: []string{"nouuid"}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
}

func TestNewFails(t *testing.T) {
	ext4 := device(t, mkfs("ext4")...)
	for name, c := range map[string]struct {
		Config
		says string
	}{
		"unknown filesystem": {Config{FSType: "nosuchfs", Source: ext4.Path()}, "does not know the filesystem"},
		"wrong filesystem":   {Config{FSType: "xfs", Source: ext4.Path()}, "dmesg | grep -i xfs"},
		"empty image":        {Config{FSType: "ext4", Source: device(t).Path()}, "dmesg | grep -i ext4"},
		"unknown option":     {Config{FSType: "ext4", Source: ext4.Path(), Data: []string{"nosuchoption=1"}}, "the kernel says: e ext4: Unknown parameter 'nosuchoption'"},
		"missing device":     {Config{FSType: "ext4", Source: "/dev/nosuchdevice"}, "the kernel says: e "},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := New(c.Config)
			if err == nil {
				d.Close()
				t.Fatal("the mount succeeded")
			}
			if text := err.Error(); !strings.Contains(text, c.says) || !strings.Contains(text, c.Source) {
				t.Errorf("the error lacks %q or %q: %s", c.says, c.Source, text)
			}
			t.Log(err)
		})
	}
}

func TestCloneOfFileOntoFile(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := os.WriteFile(filepath.Join(dir.Name(), "source"), []byte("source"), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := OpenTarget(dir, "source", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	d, err := Clone(source)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Attach(target(t, false)); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file on a directory: %v", err)
	}
	if err := d.SetAttr(Attr{ReadOnly: true, NoATime: true}); err != nil {
		t.Fatal(err)
	}
	at := target(t, true)
	if err := d.Attach(at); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(at.Name()); string(got) != "source" {
		t.Errorf("the target has %q: %v", got, err)
	}
	if _, err := os.OpenFile(at.Name(), os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("opening the read-only mount for writing: %v", err)
	}
	m, err := At(at.Name())
	if err != nil || m == nil || !strings.HasSuffix(m.Root, "/source") || !m.Attr.ReadOnly {
		t.Errorf("At: %+v, %v", m, err)
	}
	// The source is not read-only through its own mount.
	if f, err := os.OpenFile(filepath.Join(dir.Name(), "source"), os.O_RDWR, 0); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	top, err := os.Open(filepath.Dir(filepath.Dir(at.Name())))
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	rel, err := filepath.Rel(top.Name(), at.Name())
	if err != nil {
		t.Fatal(err)
	}
	if err := UnmountTarget(top, rel); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(at.Name()); string(got) != "below" {
		t.Errorf("after the unmount the target has %q: %v", got, err)
	}
}

// TestCloneOfDeviceNode does what a block volume needs: it binds a device's node without
// opening the device.
func TestCloneOfDeviceNode(t *testing.T) {
	dev := device(t)
	d, err := CloneNode(dev.Path())
	if err != nil {
		t.Fatal(err)
	}
	mustShowNode(t, d, dev)
}

// mustShowNode attaches the mount of a device's node, and looks at it.
func mustShowNode(t *testing.T, d *Detached, dev *loopdev.Device) {
	t.Helper()
	defer d.Close()
	at := target(t, true)
	if err := d.Attach(at); err != nil {
		t.Fatal(err)
	}
	node, err := os.OpenFile(at.Name(), unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if index, ok := loopdev.NodeIndex(node); !ok || index != dev.Index() {
		t.Errorf("the target is a node of loop%d, %v, want %s", index, ok, dev.Path())
	}
	if m, err := At(at.Name()); err != nil || m == nil || m.FSType != "devtmpfs" || "/dev"+m.Root != dev.Path() {
		t.Errorf("the mount table has %+v, want %s in devtmpfs: %v", m, dev.Path(), err)
	}
}

// TestInOwnDev mounts filesystems and device nodes where /dev is a tmpfs. What the mount table
// shows is the same as elsewhere.
func TestInOwnDev(t *testing.T) {
	fill := map[string]func(path string) error{
		"no node":      func(string) error { return nil },
		"another node": func(path string) error { return unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 1<<19))) },
		"a copy of the node": func(path string) error {
			st, err := devfs.Stat(path)
			if err != nil {
				return err
			}
			return unix.Mknod(path, st.Mode, int(st.Rdev))
		},
	}
	for name, fill := range fill {
		for _, fs := range []string{"btrfs", "ext4", "xfs"} {
			t.Run(name+", "+fs, func(t *testing.T) {
				dev := device(t, mkfs(fs)...)
				var d, node *Detached
				testenv.InOwnDev(t, func() {
					err := fill(dev.Path())
					if err == nil {
						d, err = New(Config{FSType: fs, Source: dev.Path()})
					}
					if err == nil {
						node, err = CloneNode(dev.Path())
					}
					if err != nil {
						t.Error(err)
					}
				})
				if t.Failed() {
					return
				}
				mustShowNode(t, node, dev)
				defer d.Close()
				at := target(t, false)
				if err := d.Attach(at); err != nil {
					t.Fatal(err)
				}
				if m, err := At(at.Name()); err != nil || m == nil || m.FSType != fs || m.Source != dev.Path() {
					t.Errorf("the mount table has %+v, want %s on %s: %v", m, fs, dev.Path(), err)
				}
			})
		}
	}
}

// BenchmarkMount mounts an ext4 where /dev is the kernel's devtmpfs, and where it is not.
func BenchmarkMount(b *testing.B) {
	dev := device(b, mkfs("ext4")...)
	run := func(b *testing.B) {
		for b.Loop() {
			d, err := New(Config{FSType: "ext4", Source: dev.Path()})
			if err != nil {
				b.Error(err)
				return
			}
			d.Close()
		}
	}
	b.Run("devtmpfs", run)
	b.Run("a dev of its own", func(b *testing.B) { testenv.InOwnDev(b, func() { run(b) }) })
	at := func(b *testing.B) {
		for b.Loop() {
			if err := devfs.At(dev.Path(), func() error { return nil }); err != nil {
				b.Error(err)
			}
		}
	}
	b.Run("only the path, devtmpfs", at)
	b.Run("only the path, a dev of its own", func(b *testing.B) { testenv.InOwnDev(b, func() { at(b) }) })
}

func TestAtShowsTheTopmost(t *testing.T) {
	at := target(t, false)
	var roots []*Detached
	for _, name := range []string{"first", "second"} {
		d, err := New(Config{FSType: "tmpfs", Source: name})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		roots = append(roots, d)
	}
	if err := roots[0].Attach(at); err != nil {
		t.Fatal(err)
	}
	if err := roots[1].Attach(roots[0].File()); err != nil {
		t.Fatal(err)
	}
	for _, d := range roots {
		d.Close()
	}
	for _, want := range []string{"second", "first"} {
		if m, err := At(at.Name()); err != nil || m == nil || m.Source != want {
			t.Errorf("At: %+v, %v; want %s", m, err, want)
		}
		if err := unmount(at.Name()); err != nil {
			t.Fatal(err)
		}
	}
	if m, err := At(at.Name()); m != nil || err != nil {
		t.Errorf("At after both were unmounted: %+v, %v", m, err)
	}
}

func TestUnmountDoesNotFollowLinks(t *testing.T) {
	at := target(t, false)
	d, err := New(Config{FSType: "tmpfs"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Attach(at); err != nil {
		t.Fatal(err)
	}
	d.Close()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(at.Name(), link); err != nil {
		t.Fatal(err)
	}
	if err := unmount(link); !errors.Is(err, ErrNotMounted) {
		t.Errorf("Unmount of a link: %v", err)
	}
	dir, err := os.Open(filepath.Dir(link))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	inside := filepath.Join(filepath.Dir(link), "inside")
	if err := os.Symlink(filepath.Dir(at.Name()), inside); err != nil {
		t.Fatal(err)
	}
	for rel, want := range map[string]error{
		"link":                                  ErrNotMounted,
		"inside/" + filepath.Base(at.Name()):    ErrSymlink,
		"../" + filepath.Base(at.Name()):        ErrEscapes,
		at.Name():                               ErrEscapes,
		".":                                     ErrEscapes,
		"missing/" + filepath.Base(at.Name()):   os.ErrNotExist,
		"inside/../" + filepath.Base(at.Name()): os.ErrNotExist,
	} {
		if err := UnmountTarget(dir, rel); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", rel, err, want)
		}
	}
	if m, err := At(at.Name()); m == nil || err != nil {
		t.Errorf("the mount is gone: %v", err)
	}
}

func TestAttachToRemovedTarget(t *testing.T) {
	d, err := New(Config{FSType: "tmpfs"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := filepath.Join(t.TempDir(), "target")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	at, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := d.Attach(at); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "removed") {
		t.Error(err)
	}
}

// TestAttachPropagates: an attached mount appears in the peers of a shared parent.
func TestAttachPropagates(t *testing.T) {
	parent := target(t, false)
	peer := target(t, false)
	for _, args := range [][]string{
		{"mount", "-t", "tmpfs", "tmpfs", parent.Name()},
		{"mount", "--make-shared", parent.Name()},
		{"mount", "--bind", parent.Name(), peer.Name()},
	} {
		testenv.Run(t, args[0], args[1:]...)
	}
	if err := os.Mkdir(filepath.Join(parent.Name(), "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	at, err := os.Open(filepath.Join(parent.Name(), "sub"))
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{FSType: "tmpfs", Source: "propagated"})
	if err != nil {
		t.Fatal(err)
	}
	err = d.Attach(at)
	if err := errors.Join(err, at.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if m, err := At(filepath.Join(peer.Name(), "sub")); err != nil || m == nil || m.Source != "propagated" {
		t.Errorf("the peer has %+v: %v", m, err)
	}
	if err := unmount(filepath.Join(parent.Name(), "sub")); err != nil {
		t.Error(err)
	}
	if m, err := At(filepath.Join(peer.Name(), "sub")); m != nil || err != nil {
		t.Errorf("after the unmount the peer has %+v: %v", m, err)
	}
}

// TestShutDownFilesystem: the filesystem of a volume whose pool ran full may have shut
// down. It must still be found and unmounted.
func TestShutDownFilesystem(t *testing.T) {
	d, err := New(Config{FSType: "xfs", Source: device(t, mkfs("xfs")...).Path()})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	at := target(t, false)
	if err := d.Attach(at); err != nil {
		t.Fatal(err)
	}
	d.Close()
	root, err := os.Open(at.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	const goingDown = 0x8004587d // XFS_IOC_GOINGDOWN, _IOR('X', 125, __u32)
	var flags uint32
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, root.Fd(), goingDown, uintptr(unsafe.Pointer(&flags))); e != 0 {
		t.Fatal(e)
	}
	if ok, err := IsMountPoint(root); !ok && !errors.Is(err, unix.EIO) {
		t.Errorf("IsMountPoint: %v, %v", ok, err)
	} else {
		t.Logf("IsMountPoint: %v, %v", ok, err)
	}
	root.Close()
	if m, err := At(at.Name()); m == nil || err != nil {
		t.Errorf("At: %+v, %v", m, err)
	}
	if err := unmount(at.Name()); err != nil {
		t.Error(err)
	}
}

func BenchmarkNewAttachUnmount(b *testing.B) {
	dev := device(b, mkfs("ext4")...)
	at := target(b, false)
	for b.Loop() {
		d, err := New(Config{FSType: "ext4", Source: dev.Path()})
		if err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(d.Attach(at), d.Close(), unmount(at.Name())); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCloneAttachUnmount(b *testing.B) {
	at := target(b, false)
	source := target(b, false)
	for b.Loop() {
		d, err := Clone(source)
		if err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(d.Attach(at), d.Close(), unmount(at.Name())); err != nil {
			b.Fatal(err)
		}
	}
}

// TestOldKernel: on a kernel without statmount the mount table gives the same answers.
func TestOldKernel(t *testing.T) {
	testenv.OnOldKernel(t, testenv.Statmount, "TestIsOldKernel|TestNewAttachUnmount|TestCloneOf.*|TestInOwnDev|TestAtShowsTheTopmost|TestShared|TestAttachPropagates|TestShutDownFilesystem|TestElsewhere|TestAtAndIsMountPoint")
}

// TestIsOldKernel: here the kernel has statmount, and where TestOldKernel calls it, it has not.
func TestIsOldKernel(t *testing.T) {
	_, err := statmount(1)
	if has := !errors.Is(err, unix.ENOSYS); has != statmountWorks() || has == (os.Getenv(testenv.OldKernel) != "") {
		t.Errorf("statmount is used: %v, and returns %v", statmountWorks(), err)
	}
}

// TestBothWays: statmount and the mount table describe mounts alike.
func TestBothWays(t *testing.T) {
	if !statmountWorks() {
		t.Fatal("this kernel does not have statmount with all fields: this test needs Linux 6.13")
	}
	configs := []Config{
		{FSType: "ext4", Source: device(t, mkfs("ext4")...).Path(), Data: []string{"ro", "errors=remount-ro"}, Attr: Attr{NoSUID: true}},
		{FSType: "xfs", Source: device(t, mkfs("xfs")...).Path(), Attr: Attr{ReadOnly: true, NoExec: true}},
		{FSType: "btrfs", Source: device(t, mkfs("btrfs")...).Path(), Attr: Attr{NoDev: true, NoATime: true}},
		{FSType: "tmpfs"},
		{FSType: "tmpfs", Source: "a name, with\\ and\tand\nand \\040"},
	}
	at := target(t, false)
	for _, c := range configs {
		d, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Attach(at)
		d.Close()
		if err != nil {
			t.Fatal(err)
		}
		top, err := os.OpenFile(at.Name(), unix.O_PATH, 0)
		if err != nil {
			t.Fatal(err)
		}
		short, errShort := Of(top)
		long, errLong := listed(top, true)
		on, errOn := Holding(top)
		top.Close()
		if errShort != nil || errLong != nil || errOn != nil || short == nil || long == nil || *short != *long || *on != *long {
			t.Errorf("%+v: %v, %v, %v\n%+v\n%+v\n%+v", c, errShort, errLong, errOn, short, long, on)
		}
		if short != nil {
			t.Logf("%+v", *short)
		}
	}
}

// TestElsewhere: a mount that is detached, or in another mount namespace, is in no table that
// this process can read.
func TestElsewhere(t *testing.T) {
	d, err := New(Config{FSType: "tmpfs"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mustBeElsewhere(t, d.File())
	var there *os.File
	testenv.InOwnDev(t, func() {
		// What is mounted here is seen nowhere else.
		if err := unix.Mount("tmpfs", "/dev", "tmpfs", 0, ""); err != nil {
			t.Error(err)
			return
		}
		if there, err = os.OpenFile("/dev", unix.O_PATH, 0); err != nil {
			t.Error(err)
		}
	})
	if there != nil {
		defer there.Close()
		mustBeElsewhere(t, there)
	}
}

func mustBeElsewhere(t *testing.T, root *os.File) {
	t.Helper()
	if ok, err := IsMountPoint(root); !ok || err != nil {
		t.Errorf("IsMountPoint: %v, %v", ok, err)
	}
	if m, err := Of(root); m != nil || err != nil {
		t.Errorf("Of: %+v, %v", m, err)
	}
	if m, err := Holding(root); m != nil || !errors.Is(err, ErrNotMounted) {
		t.Errorf("Holding: %+v, %v", m, err)
	}
}

// BenchmarkOf looks at the last of 1000 mounts.
func BenchmarkOf(b *testing.B) {
	dir := testenv.Tmpfs(b)
	var last string
	for i := range 1000 {
		at := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(at, 0o700); err != nil {
			b.Fatal(err)
		}
		testenv.Run(b, "mount", "-t", "tmpfs", "tmpfs", at)
		b.Cleanup(func() { testenv.Unmount(b, at) })
		last = at
	}
	f, err := os.OpenFile(last, unix.O_PATH, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			all, err := List(func(m *mountinfo.Info) bool { return m.Mountpoint == last }, last)
			if len(all) != 1 || err != nil {
				b.Fatal(all, err)
			}
		}
	})
	for name, look := range map[string]func() (*Info, error){
		"statmount": func() (*Info, error) { return Of(f) },
		"mountinfo": func() (*Info, error) { return listed(f, true) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if m, err := look(); m == nil || err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestShared asks of a mount that is shared, and of the same one when it is private.
func TestShared(t *testing.T) {
	at := testenv.Tmpfs(t)
	for _, c := range []struct {
		propagation uintptr
		shared      bool
	}{{unix.MS_SHARED, true}, {unix.MS_PRIVATE, false}} {
		if err := unix.Mount("", at, "", c.propagation, ""); err != nil {
			t.Fatal(err)
		}
		if m, err := At(at); err != nil || m == nil || m.Shared != c.shared {
			t.Errorf("propagation %#x: %+v, %v", c.propagation, m, err)
		}
	}
}
