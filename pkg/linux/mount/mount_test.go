// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package mount

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func TestAttrBits(t *testing.T) {
	if got := (Attr{}).bits(); got != 0 {
		t.Errorf("the zero value has the bits %#x", got)
	}
	all := Attr{ReadOnly: true, NoSUID: true, NoDev: true, NoExec: true, NoATime: true}
	if got, want := all.bits(), uint64(0x1|0x2|0x4|0x8|0x10); got != want {
		t.Errorf("all attributes have the bits %#x, want %#x", got, want)
	}
	for bits := range uint64(0x100) { // among them those of other attributes
		if got := attrOfBits(bits).bits(); got != bits&0x1f {
			t.Errorf("of the bits %#x the attributes keep %#x", bits, got)
		}
	}
}

// tree makes a root to open paths below, and a directory outside of it that they must
// not reach.
//
//	outside/
//	root/dir/file
//	root/in -> dir, root/out -> ../outside, root/abs -> /, root/dangling -> nowhere
func tree(t *testing.T) *os.File {
	t.Helper()
	top := t.TempDir()
	root := filepath.Join(top, "root")
	err := errors.Join(
		os.MkdirAll(filepath.Join(root, "dir"), 0o700),
		os.Mkdir(filepath.Join(top, "outside"), 0o700),
		os.WriteFile(filepath.Join(root, "dir", "file"), nil, 0o600),
		os.Symlink("dir", filepath.Join(root, "in")),
		os.Symlink("../outside", filepath.Join(root, "out")),
		os.Symlink("/", filepath.Join(root, "abs")),
		os.Symlink("nowhere", filepath.Join(root, "dangling")),
	)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestOpenTarget(t *testing.T) {
	root := tree(t)
	for _, c := range []struct {
		rel   string
		flags int
		want  error
	}{
		{".", 0, nil},
		{"dir", syscall.O_DIRECTORY, nil},
		{"dir/file", 0, nil},
		{"dir/../dir/file", 0, nil},
		{"dir/file", syscall.O_DIRECTORY, syscall.ENOTDIR},
		{"missing", 0, os.ErrNotExist},
		{"..", 0, ErrEscapes},
		{"../outside", 0, ErrEscapes},
		{"dir/../../outside", 0, ErrEscapes},
		{"/etc", 0, ErrEscapes},
		{"in", 0, ErrSymlink},
		{"in", syscall.O_DIRECTORY, ErrSymlink},
		{"in/file", 0, ErrSymlink},
		{"out", 0, ErrSymlink},
		{"abs/etc", 0, ErrSymlink},
		{"dangling", 0, ErrSymlink},
	} {
		f, err := OpenTarget(root, c.rel, c.flags)
		if !errors.Is(err, c.want) {
			t.Errorf("%q: got %v, want %v", c.rel, err, c.want)
		}
		if err == nil {
			f.Close()
		}
	}
}

func TestOpenTargetRefusesMagicLinks(t *testing.T) {
	proc, err := os.Open("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	if _, err := OpenTarget(proc, "root", 0); !errors.Is(err, ErrSymlink) {
		t.Error(err)
	}
}

// TestOpenTargetBesideRenames: a rename anywhere on the machine makes the kernel refuse
// a path with "..", for the moment.
func TestOpenTargetBesideRenames(t *testing.T) {
	root := tree(t)
	a, b := filepath.Join(root.Name(), "a"), filepath.Join(root.Name(), "b")
	if err := os.Mkdir(a, 0o700); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	done := make(chan error)
	go func() {
		var err error
		for err == nil {
			select {
			case <-stop:
				done <- nil
				return
			default:
				err = errors.Join(os.Rename(a, b), os.Rename(b, a))
			}
		}
		done <- err
	}()
	for range 5000 {
		f, err := OpenTarget(root, "dir/../dir/../dir/file", 0)
		if err != nil {
			t.Error(err)
			break
		}
		f.Close()
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestDisturbedForEver: who renames without end cannot keep a call busy.
func TestDisturbedForEver(t *testing.T) {
	calls := 0
	_, err := untilUndisturbed(func() (*os.File, error) {
		calls++
		return nil, unix.EAGAIN
	})
	if !errors.Is(err, unix.EAGAIN) || calls != disturbances {
		t.Errorf("after %d calls: %v", calls, err)
	}
	calls = 0
	_, err = untilUndisturbed(func() (*os.File, error) {
		if calls++; calls < disturbances {
			return nil, unix.EAGAIN
		}
		return nil, unix.ENOENT
	})
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("an undisturbed call after %d: %v", calls, err)
	}
}

// TestTargetReplacedBySymlink: an open target stays the one that was checked, even if its
// path becomes a link afterwards. A path that became a link before is refused.
func TestTargetReplacedBySymlink(t *testing.T) {
	root := tree(t)
	path := filepath.Join(root.Name(), "target")
	before, err := MkdirTarget(root, "target", 0o700)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if err := errors.Join(os.Rename(path, path+"2"), os.Symlink("../outside", path)); err != nil {
		t.Fatal(err)
	}
	info, err := before.Stat()
	if err != nil {
		t.Fatal(err)
	}
	moved, err := os.Stat(path + "2")
	if err != nil || !os.SameFile(info, moved) {
		t.Errorf("the open target is another file now: %v", err)
	}
	if _, err := OpenTarget(root, "target", 0); !errors.Is(err, ErrSymlink) {
		t.Errorf("OpenTarget: %v", err)
	}
	if _, err := MkdirTarget(root, "target", 0o700); !errors.Is(err, ErrSymlink) {
		t.Errorf("MkdirTarget: %v", err)
	}
}

func TestMkdirTarget(t *testing.T) {
	root := tree(t)
	for _, c := range []struct {
		rel  string
		want error
	}{
		{"new", nil},
		{"new", nil}, // again
		{"dir/new", nil},
		{"dir/./new/", nil},
		{".", nil},
		{"missing/new", os.ErrNotExist},
		{"dir/file", syscall.ENOTDIR},
		{"dir/file/new", syscall.ENOTDIR},
		{"", ErrEscapes},
		{"..", ErrEscapes},
		{"../new", ErrEscapes},
		{"dir/../../new", ErrEscapes},
		{"/new", ErrEscapes},
		{"in", ErrSymlink},
		{"in/new", ErrSymlink},
		{"out/new", ErrSymlink},
		{"dangling", ErrSymlink},
	} {
		f, err := MkdirTarget(root, c.rel, 0o750)
		if !errors.Is(err, c.want) {
			t.Errorf("%q: got %v, want %v", c.rel, err, c.want)
			continue
		}
		if err != nil {
			continue
		}
		info, err := f.Stat()
		if err != nil || !info.IsDir() {
			t.Errorf("%q: %v is no directory: %v", c.rel, info, err)
		}
		f.Close()
	}
	for _, name := range []string{"../new", "../outside/new", "nowhere"} {
		if _, err := os.Lstat(filepath.Join(root.Name(), name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was made: %v", name, err)
		}
	}
}

func TestAtAndIsMountPoint(t *testing.T) {
	proc, err := At("/proc")
	if err != nil || proc == nil || proc.FSType != "proc" || proc.Mountpoint != "/proc" {
		t.Errorf("/proc: %+v, %v", proc, err)
	}
	root := tree(t)
	for _, name := range []string{"dir", "in", "missing", "dir/file", "dir/file/missing"} {
		if m, err := At(filepath.Join(root.Name(), name)); m != nil || err != nil {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
	if err := os.Symlink("/proc", filepath.Join(root.Name(), "proc")); err != nil {
		t.Fatal(err)
	}
	if m, err := At(filepath.Join(root.Name(), "proc")); m != nil || err != nil {
		t.Errorf("a link to a mount point: %+v, %v", m, err)
	}
	if err := os.Symlink("/", filepath.Join(root.Name(), "slash")); err != nil {
		t.Fatal(err)
	}
	if m, err := At(filepath.Join(root.Name(), "slash", "proc")); err != nil || m == nil || *m != *proc {
		t.Errorf("a mount point behind a link: %+v, %v", m, err)
	}
	if ok, err := IsMountPoint(root); ok || err != nil {
		t.Errorf("IsMountPoint(%s): %v, %v", root.Name(), ok, err)
	}
	f, err := os.Open("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if ok, err := IsMountPoint(f); !ok || err != nil {
		t.Errorf("IsMountPoint(/proc): %v, %v", ok, err)
	}
	if m, err := Of(f); err != nil || m == nil || *m != *proc {
		t.Errorf("Of(/proc): %+v, %v", m, err)
	}
	if m, err := Of(root); m != nil || err != nil {
		t.Errorf("Of(%s): %+v, %v", root.Name(), m, err)
	}
}

func TestList(t *testing.T) {
	all, err := List(func(*mountinfo.Info) bool { return true }, "\n")
	if err != nil || !slices.ContainsFunc(all, func(m *mountinfo.Info) bool { return m.Mountpoint == "/proc" }) {
		t.Errorf("%d mounts without /proc: %v", len(all), err)
	}
	procs, err := List(func(m *mountinfo.Info) bool { return m.FSType == "proc" }, "no such text", "proc")
	if err != nil || len(procs) == 0 || len(procs) >= len(all) {
		t.Errorf("%d of %d mounts are of the type proc: %v", len(procs), len(all), err)
	}
	if none, err := List(func(*mountinfo.Info) bool { return true }, "no such text"); err != nil || len(none) > 0 {
		t.Errorf("%v: %v", none, err)
	}
}

// unmount is [UnmountTarget] for a path.
func unmount(path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	return UnmountTarget(parent, filepath.Base(path))
}

func TestUnmountOfNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		if err := unmount(t.TempDir()); !errors.Is(err, unix.EPERM) {
			t.Error(err)
		}
		return
	}
	if err := unmount(t.TempDir()); !errors.Is(err, ErrNotMounted) {
		t.Error(err)
	}
	if err := unmount(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSplitOptions(t *testing.T) {
	for options, want := range map[string][]string{
		"":                              {""},
		"rw":                            {"rw"},
		"ro,discard":                    {"ro", "discard"},
		`rw,context="u:r:t:s0:c1,ro",x`: {"rw", "context=u:r:t:s0:c1,ro", "x"},
		`rw,context=u:r:t:s0`:           {"rw", "context=u:r:t:s0"},
		`rw,a="b,c`:                     {"rw", "a=b,c"},
		`rw,,`:                          {"rw", "", ""},
	} {
		if got := SplitOptions(options); !slices.Equal(got, want) {
			t.Errorf("%s: %q", options, got)
		}
	}
}

func TestText(t *testing.T) {
	for want, options := range map[string][]string{
		"":                              nil,
		"nouuid,size=4096":              {"nouuid", "size=4096"},
		`a,context="u:r:t:s0:c1,c2",b=`: {"a", "context=u:r:t:s0:c1,c2", "b="},
	} {
		if got := text(options); got != want {
			t.Errorf("%q is %s", options, got)
		}
	}
}
