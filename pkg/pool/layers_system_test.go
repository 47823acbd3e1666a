// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package pool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// hosts are filesystems of nodes. Each has about 700 MiB free.
var hosts = map[string]func(testing.TB) string{
	"ext4":  func(t testing.TB) string { return testenv.Ext4.Mount(t, 800<<20) },
	"xfs":   func(t testing.TB) string { return testenv.XFS.Mount(t, 800<<20) },
	"btrfs": func(t testing.TB) string { return testenv.Btrfs.Mount(t, 800<<20) },
	"tmpfs": func(t testing.TB) string {
		at := testenv.Tmpfs(t)
		testenv.Run(t, "mount", "-o", "remount,size=800M", at)
		return at
	},
}

// onHosts runs a test on a loopback pool that is larger than the node's filesystem.
func onHosts(t *testing.T, test func(t *testing.T, host string, p *Pool)) {
	testenv.Root(t)
	for name, mount := range hosts {
		t.Run(name, func(t *testing.T) {
			host := mount(t)
			p := mustOpen(t, Config{Dir: filepath.Join(host, "pool"), LoopbackSize: 2 << 30, NodeDir: host})
			t.Cleanup(func() {
				p.Close()
				testenv.Umount(t, p.Root())
			})
			if want := filepath.Join(host, "pool", loopbackMount); p.Root() != want {
				t.Fatalf("the root is %s, want %s", p.Root(), want)
			}
			test(t, host, p)
		})
	}
}

func space(t *testing.T, p *Pool) Space {
	t.Helper()
	s, err := p.Space()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func taken(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

func hostFile(p *Pool) string { return filepath.Join(filepath.Dir(p.Root()), loopbackImage) }

// TestSpaceIsThatOfAllLayers: a pool of 2 GiB on a smaller filesystem has what that has, also
// when somebody else fills it.
func TestSpaceIsThatOfAllLayers(t *testing.T) {
	onHosts(t, func(t *testing.T, host string, p *Pool) {
		st, err := fsctl.StatusAt(host)
		if err != nil {
			t.Fatal(err)
		}
		s := space(t, p)
		if s.Total > 800<<20 || s.Available > st.Available || s.Available < st.Available-80<<20 || !strings.Contains(s.Limit, hostFile(p)) {
			t.Errorf("%+v, want what the host has: %s", s, size.Format(st.Available))
		}
		layers, err := p.Layers()
		if err != nil || len(layers) < 2 || layers[0].Shared || !layers[1].Shared {
			t.Errorf("the layers are %+v: %v", layers, err)
		}
		p.nodeHeadroom = size.Share{Percent: 50}
		if left := space(t, p); left.Available > s.Available-300<<20 || !strings.Contains(left.Limit, "left to the node") {
			t.Errorf("with half of the host left to the node: %+v", left)
		}
		p.nodeHeadroom = size.Share{}
		testenv.Fill(t, host)
		if full := space(t, p); full.Available > 8<<20 {
			t.Errorf("on a full host: %+v", full)
		}
		// A plugin that starts now must serve: volumes have to be unpublished.
		mustOpen(t, Config{Dir: filepath.Join(host, "pool"), LoopbackSize: 2 << 30, NodeDir: host})
		if err := os.Remove(filepath.Join(host, "filler")); err != nil {
			t.Fatal(err)
		}
		testenv.Eventually(t, "the host's space to come back", func() bool {
			testenv.Run(t, "sync", "-f", host)
			return space(t, p).Available > s.Available-16<<20
		})
	})
}

// TestFilesOfTheNode: without a loopback pool the node's filesystem is the pool's own.
func TestFilesOfTheNode(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			at := kind.Pool(t)
			kubelet := filepath.Join(at, "kubelet")
			if kind.Name == "btrfs" { // subvolumes have device numbers of their own, and share the space
				testenv.Run(t, "btrfs", "subvolume", "create", kubelet)
			} else if err := os.Mkdir(kubelet, 0o700); err != nil {
				t.Fatal(err)
			}
			fifth := size.Share{Percent: 20}
			p := mustOpen(t, Config{Dir: filepath.Join(at, "pool"), NodeDir: kubelet, NodeHeadroom: fifth})
			if s := space(t, p); s.Headroom != fifth.Of(s.Total) || s.Limit != "" {
				t.Errorf("on the node's filesystem: %+v", s)
			}
			p = mustOpen(t, Config{Dir: filepath.Join(at, "pool"), NodeDir: testenv.Dir(t), NodeHeadroom: fifth})
			if s := space(t, p); s.Headroom != 0 {
				t.Errorf("on a filesystem of its own: %+v", s)
			}
		})
	}
}

// TestReserveThroughLayers fills the host after a reservation. What was reserved can be
// written, and what was not cannot.
func TestReserveThroughLayers(t *testing.T) {
	onHosts(t, func(t *testing.T, host string, p *Pool) {
		const length = 200 << 20
		var images [2]*os.File
		for i := range images {
			f, err := p.NewVolume()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			images[i] = f
		}
		before := taken(t, hostFile(p))
		if err := p.Reserve(images[0], length); err != nil {
			t.Fatal(err)
		}
		if now := taken(t, hostFile(p)); now < before+length {
			t.Errorf("the host's file took %s, and takes %s", size.Format(before), size.Format(now))
		}
		if err := sparse.Reserve(images[1], length); err != nil { // in the pool alone
			t.Fatal(err)
		}
		for i, want := range []int64{0, length} {
			if missing, err := p.Unreserved(images[i], length); err != nil || missing != want && !strings.HasSuffix(t.Name(), "tmpfs") {
				t.Errorf("image %d lacks %s, want %s: %v", i, size.Format(missing), size.Format(want), err)
			}
		}
		if err := p.Reserve(images[0], length); err != nil {
			t.Errorf("again: %v", err)
		}
		testenv.Fill(t, host)
		block := bytes.Repeat([]byte("data"), 256<<10)
		write := func(f *os.File) error {
			for at := int64(0); at < length; at += int64(len(block)) {
				if _, err := f.WriteAt(block, at); err != nil {
					return err
				}
			}
			return f.Sync()
		}
		if err := write(images[0]); err != nil {
			t.Errorf("what was reserved: %v", err)
		}
		if err := write(images[1]); err == nil {
			t.Error("on a full host, what was not reserved could be written: the test shows nothing")
		}
		if err := p.Reserve(images[1], length); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "below the pool") {
			t.Errorf("reserving on a full host: %v", err)
		}
		if err := p.Sync(); err != nil { // reports, once, that the writing failed
			t.Log(err)
		}
		// The pool goes on: deleting, which is how it gets room, needs no space below.
		for range 20 {
			path := p.Volume("v")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Remove(path), p.Sync()); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(filepath.Join(host, "filler")); err != nil {
			t.Fatal(err)
		}
		testenv.Run(t, "sync", "-f", host)
		if err := write(images[1]); err != nil {
			t.Errorf("after there was room again: %v", err)
		}
	})
}

// TestAttachReportsLostWrites writes to a file while the node is full, and attaches it. The
// kernel would drop the error, and the device would show what was there before.
func TestAttachReportsLostWrites(t *testing.T) {
	onHosts(t, func(t *testing.T, host string, p *Pool) {
		f, err := p.NewVolume()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		testenv.Fill(t, host)
		if err := f.Truncate(64 << 20); err != nil {
			t.Fatal(err)
		}
		for at := int64(0); at < 64<<20; at += 1 << 20 { // into the page cache
			if _, err := f.WriteAt(bytes.Repeat([]byte("data"), 256<<10), at); err != nil {
				t.Fatal(err)
			}
		}
		dev, err := new(loopdev.Allocator).Attach(f, loopdev.Options{AutoClear: true})
		if err == nil {
			dev.Close()
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v, want that the writes failed", err)
		}
		if err := os.Remove(filepath.Join(host, "filler")); err != nil {
			t.Fatal(err)
		}
	})
}

// TestCannotReserve: a layer that cannot reserve space is refused with the reason.
func TestCannotReserve(t *testing.T) {
	host := testenv.Btrfs.Mount(t, 800<<20)
	image := filepath.Join(host, "pool", loopbackImage)
	if err := os.Mkdir(filepath.Dir(image), 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.XFS.Format(t, image, 400<<20) // made by an older version, or by hand
	p := mustOpen(t, Config{Dir: filepath.Dir(image), LoopbackSize: 400 << 20})
	f, err := p.NewVolume()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Reserve(f, 1<<20); !errors.Is(err, ErrCannotReserve) || !strings.Contains(err.Error(), "chattr +C") {
		t.Errorf("on a file that is copied on write: %v", err)
	}
	f.Close()
	p.Close()

	// btrfs in a sparse file.
	sparse := testenv.Mount(t, 400<<20, "mkfs.btrfs", "-q")
	onBtrfs := mustOpen(t, Config{Dir: filepath.Join(sparse, "pool")})
	refused := func(step string) {
		t.Helper()
		if err := onBtrfs.CanReserve(); !errors.Is(err, ErrCannotReserve) || !strings.Contains(err.Error(), "nodiscard") {
			t.Errorf("on a btrfs in a file, %s: %v", step, err)
		}
	}
	refused("sparse")
	testenv.Run(t, "fallocate", "--length", "400M", filepath.Join(filepath.Dir(sparse), "image"))
	refused("which discards")
	testenv.Run(t, "mount", "-o", "remount,nodiscard", sparse)
	onBtrfs = mustOpen(t, Config{Dir: filepath.Join(sparse, "pool")})
	if err := onBtrfs.CanReserve(); err != nil {
		t.Errorf("on a btrfs with all of its space: %v", err)
	}
	if unused, err := onBtrfs.Unused(); err != nil || unused != 0 {
		t.Errorf("of a file that somebody has preallocated, %s are to be returned: %v", size.Format(unused), err)
	}
	if err := errors.Join(onBtrfs.Trim(), onBtrfs.CanReserve()); err != nil {
		t.Errorf("after trimming: %v", err)
	}

	// xfs in a part of a file.
	part := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", "--offset", fmt.Sprint(1<<20), testenv.Image(t, 401<<20)))
	defer testenv.Run(t, "losetup", "--detach", part)
	testenv.Run(t, "mkfs.xfs", "-q", "-s", "size=4096", part)
	at := testenv.Dir(t)
	testenv.Run(t, "mount", part, at)
	inPart := mustOpen(t, Config{Dir: filepath.Join(at, "pool")})
	if err := inPart.CanReserve(); !errors.Is(err, ErrCannotReserve) || !strings.Contains(err.Error(), part) {
		t.Errorf("in a part of a file: %v", err)
	}
	inPart.Close()
	testenv.Unmount(t, at)

	// Its file is hidden by another mount.
	testenv.Run(t, "mount", "--bind", testenv.Dir(t), filepath.Join(host, "pool", loopbackMount))
	testenv.Run(t, "umount", filepath.Join(host, "pool", loopbackMount))
	elsewhere := testenv.Dir(t)
	testenv.Run(t, "mount", "--bind", filepath.Join(host, "pool", loopbackMount), elsewhere)
	if err := os.Rename(image, image+".moved"); err != nil {
		t.Fatal(err)
	}
	hidden, err := OpenExisting(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	if err := hidden.CanReserve(); !errors.Is(err, ErrCannotReserve) || !strings.Contains(err.Error(), image) {
		t.Errorf("on a file that cannot be opened: %v", err)
	}
	hidden.Close()
	testenv.Run(t, "umount", elsewhere)
	testenv.Umount(t, p.Root())
}

// TestDeletedSpaceComesBack: what is deleted in the pool is soon free on the host.
func TestDeletedSpaceComesBack(t *testing.T) {
	onHosts(t, func(t *testing.T, host string, p *Pool) {
		before := taken(t, hostFile(p))
		for range 5 {
			if err := os.WriteFile(p.Volume("v"), bytes.Repeat([]byte("data"), 50<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := p.Sync(); err != nil {
				t.Fatal(err)
			}
			if now := taken(t, hostFile(p)); now < before+190<<20 {
				t.Errorf("200 MiB in the pool take %s on the host", size.Format(now-before))
			}
			if err := os.Remove(p.Volume("v")); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, "the space to come back", func() bool {
				if err := p.Sync(); err != nil {
					t.Fatal(err)
				}
				return taken(t, hostFile(p)) < before+16<<20
			})
		}
		if err := p.Trim(); err != nil {
			t.Error(err)
		}
	})
}

// TestLoopbackGrows opens a loopback pool with other sizes than it has.
func TestLoopbackGrows(t *testing.T) {
	onHosts(t, func(t *testing.T, host string, _ *Pool) {
		dir := filepath.Join(host, "other")
		p := loopback(t, dir, 400<<20)
		closed := false
		defer func() {
			if !closed {
				p.Close()
			}
			testenv.Umount(t, p.Root())
		}()
		total := func() int64 {
			st, err := fsctl.StatusAt(p.Root())
			if err != nil {
				t.Fatal(err)
			}
			return st.Total
		}
		if err := os.WriteFile(p.Volume("keep"), []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
		small := total()
		reopen := func(size int64) {
			t.Helper()
			p.Close()
			p = loopback(t, dir, size)
		}
		reopen(1 << 30) // in use
		if now := total(); now < small+600<<20 {
			t.Errorf("the pool had %s and has %s", size.Format(small), size.Format(now))
		}
		large := total()
		reopen(400 << 20)
		if now := total(); now != large {
			t.Errorf("a smaller size made it %s, from %s", size.Format(now), size.Format(large))
		}
		// A plugin that was killed between two of the steps.
		image := filepath.Join(dir, loopbackImage)
		if err := os.Truncate(image, 3<<29); err != nil {
			t.Fatal(err)
		}
		reopen(1 << 30)
		if now := total(); now < large+400<<20 {
			t.Errorf("an interrupted growth stays at %s", size.Format(now))
		}
		p.Close()
		testenv.Umount(t, p.Root())
		p = loopback(t, dir, 2<<30) // not in use
		if now := total(); now < 1900<<20 {
			t.Errorf("a pool that was not mounted has %s", size.Format(now))
		}
		if b, err := os.ReadFile(p.Volume("keep")); err != nil || string(b) != "data" {
			t.Errorf("the kept file has %q: %v", b, err)
		}
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if devices, err := loopdev.Find(f); err != nil || len(devices) != 1 {
			t.Errorf("the image is on %v: %v", devices, err)
		}
		closed = true
		p.Close()
	})
}

// TestLoopbackOnPoolFilesystems: the size means the same on a filesystem that could hold the
// pool itself, unless there is a pool already.
func TestLoopbackOnPoolFilesystems(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := filepath.Join(kind.Mount(t, 1<<30), "pool")
			old := mustOpen(t, Config{Dir: dir})
			// Even if its directories have other modes, as after a restore: a new pool would hide its volumes.
			if err := os.Chmod(filepath.Join(dir, volumesDir), 0o755); err != nil {
				t.Fatal(err)
			}
			if p := mustOpen(t, Config{Dir: dir, LoopbackSize: 400 << 20}); p.Root() != old.Root() {
				t.Errorf("a pool that was there was replaced by %s", p.Root())
			}
			p := loopback(t, dir+"-2", 400<<20)
			if s := space(t, p); s.Total > 400<<20 {
				t.Errorf("its size is %s", size.Format(s.Total))
			}
			p.Close()
			testenv.Umount(t, p.Root())
		})
	}
}

// BenchmarkDeleteInLoopback deletes a file of 300 MiB in a loopback pool and syncs: mounted
// as it is, with the option discard, and without it.
func BenchmarkDeleteInLoopback(b *testing.B) {
	host := testenv.Ext4.Mount(b, 2<<30)
	p := mustOpen(b, Config{Dir: filepath.Join(host, "pool"), LoopbackSize: 1 << 30})
	b.Cleanup(func() {
		p.Close()
		testenv.Umount(b, p.Root())
	})
	for _, option := range []string{"discard", "nodiscard"} {
		b.Run(option, func(b *testing.B) {
			testenv.Run(b, "mount", "-o", "remount,"+option, p.Root())
			for range b.N {
				b.StopTimer()
				if err := errors.Join(os.WriteFile(p.Volume("v"), bytes.Repeat([]byte("data"), 75<<20), 0o600), p.Sync()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if err := errors.Join(os.Remove(p.Volume("v")), p.Sync()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
