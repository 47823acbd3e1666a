// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

func mustOpen(t testing.TB, c Config) *Pool {
	t.Helper()
	p, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func TestOpen(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 400<<20), "a", "pool")
			p := mustOpen(t, Config{Dir: dir})
			if p.Root() != dir {
				t.Errorf("the root is %s, want %s", p.Root(), dir)
			}
			for _, d := range []string{"", templatesDir, volumesDir, locksDir, cacheDir} {
				fi, err := os.Stat(filepath.Join(dir, d))
				if err != nil || fi.Mode().Perm() != 0o700 || fi.Sys().(*syscall.Stat_t).Uid != 0 {
					t.Errorf("the directory %q is %v, want mode 0700 and root: %v", d, fi, err)
				}
			}
			if err := p.Check(); err != nil {
				t.Error(err)
			}
			if s, err := p.Space(); err != nil || s.Total <= 0 || s.Total > 400<<20 || s.Available > s.Total {
				t.Errorf("the space is %+v: %v", s, err)
			}
			// A template can be cloned to a volume. On btrfs neither is copy-on-write.
			src, err := p.NewTemplate()
			if err != nil {
				t.Fatal(err)
			}
			defer src.Close()
			if _, err := src.Write(make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			if err := tmpfile.Link(src, p.Template("t")); err != nil {
				t.Fatal(err)
			}
			dst, err := p.NewVolume()
			if err != nil {
				t.Fatal(err)
			}
			defer dst.Close()
			if err := reflink.Clone(dst, src); err != nil {
				t.Fatal(err)
			}
			if kind.Name == "btrfs" {
				if out := testenv.Run(t, "lsattr", p.Template("t")); !strings.Contains(strings.Fields(out)[0], "C") {
					t.Errorf("a template is copy-on-write: %s", out)
				}
			}
			mustOpen(t, Config{Dir: dir}) // it opens again, now that it has content
		})
	}
}

func TestGateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		dir   func() string
		words []string
	}{
		"ext4":                  {func() string { return testenv.Ext4.Mount(t, 64<<20) }, []string{"ext4", "0xef53", "0x9123683e", "0x58465342", "--loopback-pool-size"}},
		"tmpfs":                 {func() string { return testenv.Tmpfs(t) }, []string{"tmpfs", "0x1021994"}},
		"ext4, not there yet":   {func() string { return testenv.Ext4.Mount(t, 64<<20) + "/x/y" }, []string{"judged by", "does not exist yet"}},
		"xfs without reflink=1": {func() string { return testenv.XFSNoReflink.Mount(t, 400<<20) }, []string{"trial clone", "mkfs.xfs -m reflink=1", "--loopback-pool-size"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := c.dir()
			os.Chmod(dir, 0o700)
			_, err := Open(t.Context(), Config{Dir: dir})
			if !errors.Is(err, ErrUnusable) {
				t.Fatalf("got %v, want ErrUnusable", err)
			}
			t.Log(err)
			for _, w := range append(c.words, dir) {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the message lacks %q", w)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, templatesDir)); err == nil {
				t.Error("Open made something in a directory that it refused")
			}
		})
	}
}

func TestGateNote(t *testing.T) {
	dir := testenv.Ext4.Mount(t, 64<<20)
	if err := gate(dir); err == nil || strings.Contains(err.Error(), "judged by") {
		t.Errorf("the directory exists, and yet the message has the note for one that does not: %v", err)
	}
}

func TestOtherFilesystemInside(t *testing.T) {
	dir := filepath.Join(testenv.Btrfs.Mount(t, 400<<20), "pool")
	if err := os.MkdirAll(filepath.Join(dir, templatesDir), 0o700); err != nil {
		t.Fatal(err)
	}
	other := testenv.Btrfs.Mount(t, 200<<20)
	testenv.Run(t, "mount", "--bind", other, filepath.Join(dir, templatesDir))
	_, err := Open(t.Context(), Config{Dir: dir})
	testenv.Run(t, "umount", filepath.Join(dir, templatesDir))
	if !errors.Is(err, ErrUnusable) || !errors.Is(err, syscall.EXDEV) {
		t.Errorf("with another btrfs mounted inside: %v", err)
	}
}

func TestCheck(t *testing.T) {
	at := testenv.XFS.Mount(t, 400<<20)
	p := mustOpen(t, Config{Dir: filepath.Join(at, "pool")})
	testenv.ReadOnly(t, at)
	if err := p.Check(); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("on a read-only filesystem: %v", err)
	}
	testenv.Run(t, "mount", "-o", "remount,rw", at)
	testenv.Run(t, "mount", "-t", "tmpfs", "cover", p.Root())
	if err := p.Check(); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "no longer the directory") {
		t.Errorf("with a tmpfs mounted over the pool: %v", err)
	}
	testenv.Run(t, "umount", p.Root())
	if err := p.Check(); err != nil {
		t.Error(err)
	}
}

// loopback makes a loopback pool on the machine's own filesystem.
func loopback(t *testing.T, dir string, size int64) *Pool {
	t.Helper()
	p := mustOpen(t, Config{Dir: dir, LoopbackSize: size})
	if p.Root() != filepath.Join(dir, loopbackMount) {
		t.Fatalf("the root is %s, want %s", p.Root(), filepath.Join(dir, loopbackMount))
	}
	return p
}

func TestLoopback(t *testing.T) {
	testenv.Root(t)
	dir := filepath.Join(testenv.Ext4.Mount(t, 600<<20), "pool")
	p := loopback(t, dir, 500<<20)
	at := p.Root()
	image, err := os.Open(filepath.Join(dir, loopbackImage))
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	devices := func() []int {
		d, err := loopdev.Find(image)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := devices()
	if len(first) != 1 {
		t.Fatalf("the image is on the devices %v, want one", first)
	}
	if err := os.WriteFile(p.Volume("keep"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}

	t.Run("drops flushes", func(t *testing.T) {
		cache := fmt.Sprintf("/sys/block/loop%d/queue/write_cache", first[0])
		if err := os.WriteFile(cache, []byte("write through"), 0); err != nil {
			t.Fatal(err)
		}
		loopback(t, dir, 500<<20)
		if b, err := os.ReadFile(cache); err != nil || string(b) != "write back\n" {
			t.Errorf("the pool's device is %q: %v", b, err)
		}
	})

	t.Run("mounted", func(t *testing.T) {
		loopback(t, dir, 500<<20)
		if again := devices(); len(again) != 1 || again[0] != first[0] || testenv.Mounts(t, dir) != 1 {
			t.Errorf("the image was on %v and is on %v, with %d mounts; want one of each", first, again, testenv.Mounts(t, dir))
		}
	})
	t.Run("alive but not visible", func(t *testing.T) {
		// Another mount stands for a volume or mount namespace that holds the superblock.
		elsewhere := testenv.Dir(t)
		testenv.Run(t, "mount", "--bind", at, elsewhere)
		p.Close()
		testenv.Unmount(t, at)
		p = loopback(t, dir, 500<<20)
		if again := devices(); len(again) != 1 || again[0] != first[0] {
			t.Errorf("the image was on %v and is on %v: two filesystems on one disk", first, again)
		}
		if err := os.WriteFile(filepath.Join(elsewhere, "seen"), nil, 0o600); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(at, "seen")); err != nil {
			t.Errorf("the other mount shows another filesystem: %v", err)
		}
		testenv.Run(t, "umount", elsewhere)
	})
	t.Run("gone", func(t *testing.T) {
		p.Close()
		testenv.Umount(t, at)
		if left := devices(); len(left) != 0 {
			t.Errorf("the image is still on %v", left)
		}
		p = loopback(t, dir, 0x1234<<20) // an existing image keeps its size
		if b, err := os.ReadFile(p.Volume("keep")); err != nil || string(b) != "data" {
			t.Errorf("the kept file has %q: %v", b, err)
		}
	})
	t.Run("something else mounted there", func(t *testing.T) {
		testenv.Run(t, "mount", "-t", "tmpfs", "other", at)
		_, err := Open(t.Context(), Config{Dir: dir, LoopbackSize: 500 << 20})
		if !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "other") {
			t.Errorf("got %v, want ErrUnusable and the mount's source", err)
		}
		testenv.Run(t, "umount", at)
	})
	if dio, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/dio", devices()[0])); err != nil || strings.TrimSpace(string(dio)) != "1" {
		t.Errorf("dio is %q, want 1: %v", dio, err)
	}
	p.Close()
	testenv.Umount(t, at)
}

// TestOpenFull: a full pool must open, so that its volumes can be unpublished.
func TestOpenFull(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 400<<20), "pool")
			mustOpen(t, Config{Dir: dir})
			testenv.Fill(t, dir)
			mustOpen(t, Config{Dir: dir, LoopbackSize: 400 << 20})
			p, err := OpenExisting(dir)
			if err != nil {
				t.Fatal(err)
			}
			p.Close()
		})
	}
}

// TestOpenExistingSparesOthers opens a directory that is not a pool, but has one of its
// subdirectories.
func TestOpenExistingSparesOthers(t *testing.T) {
	site := filepath.Join(testenv.XFS.Pool(t), "site")
	if err := os.MkdirAll(filepath.Join(site, templatesDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if p, err := OpenExisting(site); p != nil || !errors.Is(err, ErrUnusable) {
		t.Errorf("got %v and %v, want ErrUnusable", p, err)
	}
	if entries, err := os.ReadDir(site); err != nil || len(entries) != 1 {
		t.Errorf("OpenExisting made something: %v, %v", entries, err)
	}
}

// TestLoopbackOnXFSWithoutReflink: an xfs that cannot share extents gets a loopback pool.
func TestLoopbackOnXFSWithoutReflink(t *testing.T) {
	dir := filepath.Join(testenv.XFSNoReflink.Mount(t, 600<<20), "pool")
	p := loopback(t, dir, 400<<20)
	p.Close()
	testenv.Umount(t, p.Root())
}

func TestOpenExisting(t *testing.T) {
	at := testenv.Ext4.Mount(t, 600<<20)
	if _, err := OpenExisting(at); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "no pool") {
		t.Errorf("an empty directory: %v", err)
	}
	if entries, err := os.ReadDir(at); err != nil || len(entries) != 1 { // lost+found
		t.Errorf("OpenExisting made something: %v, %v", entries, err)
	}
	dir := filepath.Join(at, "pool")
	p := loopback(t, dir, 400<<20)
	again, err := OpenExisting(dir)
	if err != nil || again.Root() != p.Root() {
		t.Fatalf("a loopback pool that is mounted: %v", err)
	}
	again.Close()
	p.Close()
	testenv.Umount(t, p.Root())
	if _, err := OpenExisting(dir); !errors.Is(err, ErrNotMounted) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a loopback pool that is not mounted: %v", err)
	}
}

// TestMountForThread mounts a loopback pool that another mount namespace has, and one that
// nobody has. This process sees neither mount.
func TestMountForThread(t *testing.T) {
	dir := filepath.Join(testenv.Ext4.Mount(t, 600<<20), "pool")
	p := loopback(t, dir, 400<<20)
	if err := os.WriteFile(p.Volume("keep"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	at := p.Root()
	p.Close()
	elsewhere := testenv.Dir(t) // stands for the plugin's mount namespace
	testenv.Run(t, "mount", "--bind", at, elsewhere)
	t.Cleanup(func() {
		if testenv.IsMounted(t, elsewhere) {
			testenv.Unmount(t, elsewhere)
		}
	})
	testenv.Unmount(t, at)
	plugins, err := OpenExisting(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	owner, err := plugins.Own(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	inThread := func(do func()) {
		testenv.OnThread(func() {
			err := MountForThread(t.Context(), dir)
			if err == nil {
				err = testenv.DropOthersHere(filepath.Dir(dir))
			}
			if err != nil {
				t.Error(err)
				return
			}
			do()
		})
	}
	inThread(func() {
		there, err := OpenExisting(dir)
		if err != nil {
			t.Error(err)
			return
		}
		defer there.Close()
		if b, err := os.ReadFile(there.Volume("keep")); err != nil || string(b) != "data" || there.Root() != at {
			t.Errorf("%s has %q: %v", there.Root(), b, err)
		}
		if _, err := there.Own(t.Context()); !errors.Is(err, ErrOwned) {
			t.Errorf("the pool's owner is not seen: %v", err)
		}
	})
	if testenv.IsMounted(t, at) {
		t.Error("the mount is seen here")
	}
	if err := errors.Join(owner.Unlock(), plugins.Close()); err != nil {
		t.Error(err)
	}
	testenv.Umount(t, elsewhere)
	testenv.NoLoopsBelow(t, dir)
	inThread(func() {
		there, err := OpenExisting(dir)
		if err != nil {
			t.Error(err)
			return
		}
		defer there.Close()
		if n := len(testenv.LoopsBelow(t, dir)); n != 1 {
			t.Errorf("the image is on %d devices", n)
		}
	})
	testenv.NoLoopsBelow(t, dir)
}

// TestLockHolder asks who holds a lock, which makes no lockfile.
func TestLockHolder(t *testing.T) {
	p := mustOpen(t, Config{Dir: filepath.Join(testenv.XFS.Mount(t, 400<<20), "pool")})
	ask := func(want string) {
		t.Helper()
		if holder, err := p.LockHolder("key"); err != nil || !strings.HasPrefix(holder, want) || (holder == "") != (want == "") {
			t.Errorf("the holder is %q, not %q: %v", holder, want, err)
		}
	}
	ask("")
	if _, err := os.Lstat(p.lockfile("key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a lockfile was made: %v", err)
	}
	l, err := p.Lock(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	ask(fmt.Sprintf("pid=%d ", os.Getpid()))
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
	ask("")
	if l, err = p.TryLock("key"); err != nil || l == nil {
		t.Fatalf("the answer keeps the lock: %v, %v", l, err)
	}
	if err := l.Unlock(); err != nil {
		t.Error(err)
	}
}

func TestLoopbackTooSmall(t *testing.T) {
	dir := filepath.Join(testenv.Ext4.Mount(t, 64<<20), "pool")
	_, err := Open(t.Context(), Config{Dir: dir, LoopbackSize: 10 << 20})
	if !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "300Mi") {
		t.Errorf("got %v, want ErrUnusable and 300Mi", err)
	}
	if _, err := os.Stat(filepath.Join(dir, loopbackImage)); err == nil {
		t.Error("an image was made")
	}
}

// TestLoopbackAtOnce opens one loopback pool from several goroutines at the same time.
func TestLoopbackAtOnce(t *testing.T) {
	dir := filepath.Join(testenv.Ext4.Mount(t, 600<<20), "pool")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p, err := Open(context.Background(), Config{Dir: dir, LoopbackSize: 400 << 20})
			if err != nil {
				t.Error(err)
				return
			}
			p.Close()
		})
	}
	wg.Wait()
	if n := testenv.Mounts(t, dir); n != 1 {
		t.Errorf("there are %d mounts, want one", n)
	}
	testenv.Unmount(t, filepath.Join(dir, loopbackMount))
}

// TestLockNamesHolder waits for a lock that another process holds for ever.
func TestLockNamesHolder(t *testing.T) {
	p := mustOpen(t, Config{Dir: filepath.Join(testenv.XFS.Mount(t, 400<<20), "pool")})
	path := filepath.Join(p.Root(), locksDir, "key.lock")
	holder := exec.Command("flock", "--no-fork", path, "sleep", "1000")
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		holder.Process.Kill()
		holder.Wait()
	}()
	for range 500 {
		l, err := p.TryLock("key")
		if err != nil {
			t.Fatal(err)
		}
		if l == nil {
			break
		}
		l.Unlock()
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := p.Lock(ctx, "key")
	if !errors.Is(err, ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want ErrLocked and DeadlineExceeded", err)
	}
	t.Log(err)
	for _, w := range []string{path, fmt.Sprintf("pid=%d cmd=sleep 1000", holder.Process.Pid), "leave the file"} {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the lockfile: %v", err)
	}
}

func TestLockIsFreed(t *testing.T) {
	p := mustOpen(t, Config{Dir: filepath.Join(testenv.XFS.Mount(t, 400<<20), "pool")})
	first, err := p.Lock(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	if second, err := p.TryLock("key"); err != nil || second != nil {
		t.Errorf("TryLock of a held lock: %v, %v", second, err)
	}
	time.AfterFunc(100*time.Millisecond, func() { first.Unlock() })
	second, err := p.Lock(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	second.Unlock()
}

// TestTouch records a time of use, which taking the lock does not change.
func TestTouch(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := mustOpen(t, Config{Dir: filepath.Join(kind.Mount(t, 400<<20), "pool")})
			used := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
			if err := p.Touch("key", used); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("Touch of a lock that was never taken: %v", err)
			}
			if _, err := p.Touched("key"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("Touched of a lock that was never taken: %v", err)
			}
			for range 2 {
				l, err := p.TryLock("key")
				if err != nil || l == nil {
					t.Fatalf("%v %v", l, err)
				}
				if err := errors.Join(p.Touch("key", used), l.Unlock()); err != nil {
					t.Error(err)
				}
			}
			l, err := p.Lock(t.Context(), "key")
			if err != nil {
				t.Fatal(err)
			}
			l.Unlock()
			if at, err := p.Touched("key"); err != nil || !at.Equal(used) {
				t.Errorf("last used at %s, want %s: %v", at, used, err)
			}
		})
	}
}
