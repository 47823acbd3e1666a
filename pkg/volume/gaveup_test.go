// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// givesUp are the ways in which a filesystem stops to work. The kernel does the same after an
// error of the disk, or when the pool is full.
var givesUp = map[string]struct {
	filesystem string
	size       int64
	harm       func(t testing.TB, at string)
}{
	"xfs shut down":   {"xfs", 300 * mib, shutdown},
	"ext4 shut down":  {"ext4", 64 * mib, shutdown},
	"ext4 read-only":  {"ext4", 64 * mib, remountReadOnly},
	"btrfs read-only": {"btrfs", 128 * mib, remountReadOnly},
	"xfs read-only":   {"xfs", 300 * mib, remountReadOnly},
}

// shutdown makes a filesystem return an error to everything, as after an I/O error. What was
// synced is on its disk.
func shutdown(t testing.TB, at string) {
	t.Helper()
	testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", at)
}

// remountReadOnly makes the filesystem read-only, and none of its mounts, as the kernel does
// after an error: fspick(2).
func remountReadOnly(t testing.TB, at string) {
	t.Helper()
	fs, err := unix.Fspick(unix.AT_FDCWD, at, unix.FSPICK_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		t.Fatal(err)
	}
	if err := unix.FsconfigReconfigure(fs); err != nil {
		t.Fatal(err)
	}
}

// mustRefuse checks that a call was refused because a filesystem gave up, and that the error
// has these texts.
func mustRefuse(t testing.TB, what string, err error, texts ...string) {
	t.Helper()
	t.Logf("%s: %v", what, err)
	if !errors.Is(err, errdefs.ErrState) {
		t.Errorf("%s: %v", what, err)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: the error lacks %q: %v", what, text, err)
		}
	}
}

// mustWork checks that a volume is healthy, has what was synced, and can be written.
func (n *node) mustWork(v image.Record, at string) {
	n.t.Helper()
	if h, err := n.Health(v.ID, at); err != nil || len(h) > 0 {
		n.t.Errorf("%s: %v %v", at, h, err)
	}
	mustHold(n.t, v.ID, at, 1)
	if err := writeSynced(filepath.Join(at, "more"), content(1)); err != nil {
		n.t.Error(err)
	}
}

// TestGaveUp has a filesystem that gives up under a pod. No other pod gets it, and neither
// does the same pod once more. When the pod is gone, the next one gets the filesystem mounted
// anew, with everything that was synced, though it was staged all the time.
func TestGaveUp(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			for name, c := range givesUp {
				t.Run(name, func(t *testing.T) {
					n := n.with(t)
					v := n.mustCreate(claim(strings.ReplaceAll(name, " ", "-"), c.filesystem, c.size))
					first := n.mustPublishClaim(v, "first")
					if err := writeSynced(filepath.Join(first, numbered(0)), content(0)); err != nil {
						t.Fatal(err)
					}
					c.harm(t, first)
					second := n.publishRequest(v, "second")
					stage := StageRequest{ID: v.ID, Staging: second.Staging, Use: second.Use}
					mustRefuse(t, "another pod", n.PublishClaim(t.Context(), second), v.ID, first, "delete")
					if _, err := os.Lstat(second.Target); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("the target of the pod that was refused: %v", err)
					}
					mustRefuse(t, "the same pod", n.PublishClaim(t.Context(), n.publishRequest(v, "first")), v.ID, first)
					mustRefuse(t, "staging again", n.Stage(t.Context(), stage), v.ID, first)
					_, err := n.ExpandOnNode(v.ID, first, Size{Required: 2 * c.size}, nil)
					mustRefuse(t, "expanding it", err, v.ID)
					if strings.HasSuffix(name, "shut down") {
						_, err := n.CreateSnapshot(t.Context(), v.ID, v.ID)
						mustRefuse(t, "a snapshot", err, v.ID)
					}
					n.mustUnpublishClaim(v, "first")

					n.mustWork(v, n.mustPublishClaim(v, "second"))
					c.harm(t, second.Target)
					n.mustUnpublishClaim(v, "second")
					if err := n.Stage(t.Context(), stage); err != nil {
						t.Errorf("staging again: %v", err)
					}
					n.mustWork(v, stage.Staging)
					if u, err := n.Stats(v.ID, stage.Staging); err != nil || u.TotalBytes < 3*c.size/2 {
						t.Errorf("its filesystem has not grown: %+v: %v", u, err)
					}
					if got := len(n.loops(v.ID)); got != 1 {
						t.Errorf("%d loop devices", got)
					}
					n.mustWork(v, n.mustPublishClaim(v, "third"))
					n.mustEnd(v, "third")
				})
			}
		})
	}
}

// TestGaveUpInline publishes an inline volume again at its target. A pod may have it there, so
// it stays, and the error says so.
func TestGaveUpInline(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for name, c := range givesUp {
		t.Run(name, func(t *testing.T) {
			n := n.with(t)
			r := n.request(strings.ReplaceAll(name, " ", "-"), c.filesystem, c.size)
			n.mustPublish(r)
			c.harm(t, r.Target)
			_, err := n.PublishInline(t.Context(), r)
			mustRefuse(t, "again", err, r.ID, r.Target, "delete")
			if got := testenv.Mounts(t, n.kubelet); got != 1 {
				t.Errorf("%d mounts", got)
			}
			n.mustUnpublish(r)
			n.mustPublish(r) // the pod is made again
			if err := writeSynced(filepath.Join(r.Target, "file"), content(0)); err != nil {
				t.Error(err)
			}
			n.mustUnpublish(r)
		})
	}
}

// TestGaveUpElsewhere has copies of the mount that keep the filesystem alive: in another mount
// namespace, outside of kubelet's directory, and in an open file. As long as one is left, a
// new mount would show the same broken filesystem.
func TestGaveUpElsewhere(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for name, hold := range map[string]func(t *testing.T, at string) (release func()){
		"another mount namespace": func(t *testing.T, at string) func() {
			cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", testenv.DropOthers(n.kubelet)+"echo; exec sleep 60")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := out.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			return func() {
				cmd.Process.Kill()
				cmd.Wait()
			}
		},
		"outside": func(t *testing.T, at string) func() {
			dir := testenv.Dir(t)
			testenv.Run(t, "mount", "--bind", at, dir)
			return func() { testenv.Run(t, "umount", dir) }
		},
		"an open file": func(t *testing.T, at string) func() {
			f, err := os.Open(filepath.Join(at, numbered(0)))
			if err != nil {
				t.Fatal(err)
			}
			return func() { f.Close() }
		},
	} {
		for _, way := range slices.Sorted(maps.Keys(givesUp)) {
			if name != "an open file" && way == "btrfs read-only" {
				continue // a new mount makes it writable, if it has seen no error
			}
			t.Run(name+", "+way, func(t *testing.T) {
				n := n.with(t)
				c := givesUp[way]
				v := n.mustCreate(claim(strings.ReplaceAll(strings.ReplaceAll(name+"-"+way, " ", "-"), ",", ""), c.filesystem, c.size))
				staging := n.mustStage(v)
				if err := writeSynced(filepath.Join(staging, numbered(0)), content(0)); err != nil {
					t.Fatal(err)
				}
				release := sync.OnceFunc(hold(t, staging))
				defer release()
				c.harm(t, staging)
				for range 3 { // the first may have unmounted it
					mustRefuse(t, name, n.PublishClaim(t.Context(), n.publishRequest(v, "pod")), v.ID)
				}
				release()
				n.mustWork(v, n.mustPublishClaim(v, "pod"))
				n.mustEnd(v, "pod")
			})
		}
	}
}

// TestGaveUpInlineHalfWay continues a publish that died, while something keeps the filesystem
// of the first attempt.
func TestGaveUpInlineHalfWay(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for _, way := range []string{"ext4 shut down", "ext4 read-only", "xfs shut down"} {
		c := givesUp[way]
		r := n.request(strings.ReplaceAll(way, " ", "-"), c.filesystem, c.size)
		n.mustPublish(r)
		dir := testenv.Dir(t)
		testenv.Run(t, "mount", "--bind", r.Target, dir)
		c.harm(t, dir)
		testenv.Run(t, "umount", r.Target)
		_, err := n.PublishInline(t.Context(), r)
		mustRefuse(t, way, err, r.ID)
		if testenv.IsMounted(t, r.Target) {
			t.Errorf("%s: it is mounted", way)
		}
		testenv.Run(t, "umount", dir)
		n.mustPublish(r)
		n.mustUnpublish(r)
	}
}

// TestGaveUpOnFullPool fills a pool under staged filesystems, which makes the kernel end some
// of them. With space again, the next pod can write, and has everything that was synced,
// though the volume was never unstaged.
func TestGaveUpOnFullPool(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 2*gib, Config{Overcommit: 100})
			synced := map[string]int{}
			var thin []image.Record
			for _, fs := range diskfs.Names() {
				v := n.mustCreate(claim("thin-"+fs, fs, 10*gib))
				if err := writeSynced(filepath.Join(n.mustPublishClaim(v, "first"), numbered(0)), content(0)); err != nil {
					t.Fatal(err)
				}
				thin = append(thin, v)
			}
			testenv.Fill(t, n.pool.Root())
			for _, v := range thin {
				var err error
				synced[v.ID], err = writeUntilFull(n.target(v.ID+"-first"), 1)
				if t.Logf("%s: %d files are safe, then: %v", v.ID, synced[v.ID], err); err == nil {
					t.Errorf("%s: everything could be written", v.ID)
				}
				// A pod does not stop at the first error. Metadata has no space either.
				for i := range 20 {
					at := filepath.Join(n.target(v.ID+"-first"), fmt.Sprintf("dir-%d", i))
					for j := range 100 {
						os.MkdirAll(filepath.Join(at, numbered(j)), 0o700)
					}
					testenv.Try("sync", "-f", filepath.Dir(at))
				}
			}
			ended := 0
			for _, v := range thin {
				h, err := n.Health(v.ID)
				if err != nil {
					t.Error(err)
				}
				err = n.PublishClaim(t.Context(), n.publishRequest(v, "second"))
				if len(h) > 0 && strings.HasPrefix(h[0].Code, "Filesystem") {
					ended++
					mustRefuse(t, h[0].Code, err, v.ID, n.target(v.ID+"-first"))
				} else if t.Logf("%s does its work", v.ID); err != nil {
					t.Errorf("%s: %v", v.ID, err)
				}
			}
			if ended == 0 {
				t.Error("no filesystem gave up, so that this test shows nothing")
			}
			if err := errors.Join(os.Remove(filepath.Join(n.pool.Root(), "filler")), n.pool.Sync()); err != nil {
				t.Fatal(err)
			}
			for _, v := range thin {
				if err := n.Unpublish(v.ID, n.target(v.ID+"-second")); err != nil {
					t.Error(err)
				}
				n.mustUnpublishClaim(v, "first")
				at := n.mustPublishClaim(v, "third")
				mustHold(t, v.ID, at, synced[v.ID])
				n.mustWork(v, at)
				n.mustEnd(v, "third")
			}
		})
	}
}

// TestReadOnlyOnPurpose publishes volumes that were asked for read-only. They did not give up.
func TestReadOnlyOnPurpose(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for _, c := range givesUp {
		v := n.mustCreate(claim("reader", c.filesystem, c.size))
		for _, pod := range []string{"first", "second", "first"} {
			r := n.publishRequest(v, pod)
			r.ReadOnly = true
			if err := n.PublishClaim(t.Context(), r); err != nil {
				t.Error(err)
			}
		}
		n.mustEnd(v, "first", "second")
		i := n.request("inline-reader", c.filesystem, c.size)
		i.ReadOnly = true
		n.mustPublish(i)
		n.mustPublish(i)
		n.mustUnpublish(i)
	}
}

// TestOldKernel: on a kernel without statmount a volume's mounts are found in the mount table,
// and are judged alike.
func TestOldKernel(t *testing.T) {
	testenv.OnOldKernel(t, testenv.Statmount, "TestGaveUpInline|TestShutDown|TestMountFlags|TestPublishIsIdempotent|TestUnpublishLeavesOthersAlone")
}

// BenchmarkPublishStaged publishes a claim that is staged to one more pod.
func BenchmarkPublishStaged(b *testing.B) {
	for _, fs := range diskfs.Names() {
		b.Run(fs, func(b *testing.B) {
			n := newNode(b, testenv.XFS, 4*gib)
			v := n.mustCreate(claim("bench", fs, 300*mib))
			n.mustStage(v)
			r := n.publishRequest(v, "pod")
			for b.Loop() {
				if err := n.PublishClaim(b.Context(), r); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				n.mustUnpublishClaim(v, "pod")
				b.StartTimer()
			}
			n.mustEnd(v)
		})
	}
}

// BenchmarkVitality looks at a healthy filesystem, as each publish does.
func BenchmarkVitality(b *testing.B) {
	for _, fs := range diskfs.Names() {
		b.Run(fs, func(b *testing.B) {
			n := newNode(b, testenv.XFS, 4*gib)
			v := n.mustCreate(claim("bench", fs, 300*mib))
			rel, err := n.root.Rel(n.mustStage(v))
			if err != nil {
				b.Fatal(err)
			}
			img, err := n.images.Open(v.ID)
			if err != nil {
				b.Fatal(err)
			}
			there, err := n.root.Identify(img, rel)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if is, err := n.root.Vitality(there, rel); err != nil || is != place.Alive {
					b.Fatal(is, err)
				}
			}
			img.Close()
			n.mustEnd(v)
		})
	}
}
