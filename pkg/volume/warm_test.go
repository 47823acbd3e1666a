// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/warm"
)

// ready counts the volumes that are kept ready, and the levels of all kinds.
func (n *node) ready() (ready, level int) {
	shelves, _ := n.Warm()
	for _, s := range shelves {
		ready += s.Ready
		level += s.Level
	}
	return ready, level
}

// mustBeReady waits until so many volumes are ready, and no more are to be.
func (n *node) mustBeReady(want int) {
	n.t.Helper()
	testenv.Eventually(n.t, "volumes that are ready", func() bool {
		ready, level := n.ready()
		return ready == want && level == want
	})
}

// warmSizes are small sizes of each filesystem, in bytes.
var warmSizes = map[string]int64{"ext4": 64 * mib, "xfs": 300 * mib, "btrfs": 128 * mib}

// TestWarm publishes volumes of every form that were ready, and checks that they are as any others.
func TestWarm(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 4<<30, Config{Warm: 1, WarmMost: 8})
			kinds := 0
			for fs := range warmSizes {
				for _, mode := range image.MountModes {
					cold, taken := n.request("cold-"+fs+string(mode[:4]), fs, warmSizes[fs]), n.request("warm-"+fs+string(mode[:4]), fs, warmSizes[fs])
					cold.Mode, taken.Mode = mode, mode
					taken.Access = image.Access{ReadOnly: true, NoATime: true}
					n.mustPublish(cold)
					kinds++
					n.mustBeReady(kinds)
					_, before := n.Warm()
					n.mustPublish(taken)
					if _, after := n.Warm(); total(after).Hits != total(before).Hits+1 {
						t.Errorf("%s, %s: hits %v, then %v", fs, mode, before, after)
					}
					if res := n.mustPublish(taken); !res.Existed {
						t.Error("the same volume again was made anew")
					}
					n.mustUnpublish(cold)
					n.mustUnpublish(taken)
				}
			}
		})
	}
}

func total(taken map[warm.Form]warm.Taken) (sum warm.Taken) {
	for _, n := range taken {
		sum.Hits += n.Hits
		sum.Misses += n.Misses
	}
	return sum
}

// TestWarmClaim makes a claim of an image that was ready, and uses it.
func TestWarmClaim(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 4<<30, Config{Warm: 1, WarmMost: 8})
			first := n.mustCreate(claim("first", "ext4", 64*mib))
			n.mustBeReady(1)
			second := n.mustCreate(claim("second", "ext4", 64*mib))
			if first.UUID == second.UUID || first.Template != second.Template {
				t.Errorf("%+v and then %+v", first, second)
			}
			if _, taken := n.Warm(); taken[warm.Unnamed] != (warm.Taken{Hits: 1, Misses: 1}) {
				t.Errorf("taken: %v", taken)
			}
			n.mustBeReady(1)
			thick := claim("thick", "ext4", 64*mib)
			thick.Provisioning = image.Thick
			third := n.mustCreate(thick)
			if ready, _ := n.ready(); ready != 1 {
				t.Error("a thick claim was made of an image that shares its blocks")
			}
			for _, v := range []image.Record{first, second, third} {
				n.mustStage(v)
				n.mustEnd(v)
			}
		})
	}
}

// TestWarmVolatile takes synced and volatile volumes that were ready in turn. Each has the device that it
// asked for, and what is given back is as it is for everybody.
func TestWarmVolatile(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4<<30, Config{Warm: 1, WarmMost: 8})
	for i, d := range []image.Durability{image.Volatile, image.Synced} {
		r := n.lasting(fmt.Sprint("first", i), "ext4", d)
		n.mustPublish(r)
		n.mustUnpublish(r)
	}
	n.mustBeReady(2)
	for i, d := range []image.Durability{image.Volatile, image.Synced, image.Volatile, image.Synced} {
		r := n.lasting(fmt.Sprint("volume", i), "ext4", d)
		_, before := n.Warm()
		n.mustPublish(r)
		if _, after := n.Warm(); total(after).Hits != total(before).Hits+1 {
			t.Errorf("hits %v, then %v", before, after)
		}
		if flushes := n.flushesOf(r); (flushes == 0) != (d == image.Volatile) {
			t.Errorf("%d flushes of a %s volume", flushes, d)
		}
		if record := n.record(r.ID); record.Durability != d || (record.Boot == "") != (d == image.Synced) {
			t.Errorf("the record is %+v", record)
		}
		n.mustUnpublish(r)
		n.mustBeReady(2)
	}
	var devices []int
	for _, index := range n.readyDevices() {
		if queueSays(t, index, "write_cache") == "write through" {
			devices = append(devices, index)
		}
	}
	if len(devices) != 1 {
		t.Fatalf("the devices %v drop flushes", devices)
	}
	n.contents.warm.stock.Drain()
	if is := queueSays(t, devices[0], "write_cache"); is != "write back" {
		t.Errorf("the device was given back in the mode %q", is)
	}
}

// withAnother does something with another Manager of the node, which is closed afterwards.
func (n *node) withAnother(c Config, do func(n *node)) {
	n.t.Helper()
	m, err := NewManager(c)
	if err != nil {
		n.t.Fatal(err)
	}
	defer m.Close()
	do(&node{Manager: m, t: n.t, kubelet: n.kubelet})
}

// TestWarmAgain has another process of the plugin keep ready what the last one kept.
func TestWarmAgain(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4<<30, Config{})
	config := Config{Pool: n.pool, Templates: n.contents.templates, TargetRoot: n.kubelet, Warm: 1, WarmMost: 8}
	again := func(do func(n *node)) { n.withAnother(config, do) }
	r := n.request("inline", "ext4", 64*mib)
	again(func(n *node) {
		n.mustPublish(r)
		n.mustBeReady(1)
		n.mustUnpublish(r)
	})
	again(func(n *node) {
		n.mustBeReady(1)
		n.mustPublish(r)
		if _, taken := n.Warm(); taken[warm.Mounted].Hits != 1 {
			t.Errorf("taken: %v", taken)
		}
		n.mustUnpublish(r)
	})
	// A template that is gone is not built for that, and nothing is ready of it.
	if _, err := n.contents.templates.Remove(keyOf(t, n)); err != nil {
		t.Fatal(err)
	}
	again(func(n *node) {
		time.Sleep(50 * time.Millisecond)
		if ready, level := n.ready(); ready+level > 0 {
			t.Errorf("%d of %d are ready of no template", ready, level)
		}
	})
}

// TestWarmAfterUpgrade changes the formatter between two processes. What was kept ready is kept of the
// new template, once that is there.
func TestWarmAfterUpgrade(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4<<30, Config{})
	var version atomic.Int32
	store := template.NewStore(template.Config{
		Pool: n.pool,
		Fingerprint: func(spec diskfs.Spec) (string, error) {
			return fmt.Sprintf("%016x", version.Load()), nil
		},
		Format: func(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
			of, err := n.contents.templates.Ensure(ctx, spec)
			if err != nil {
				return template.Provenance{}, err
			}
			defer of.Close()
			made := of.Provenance
			made.Fingerprint = fmt.Sprintf("%016x", version.Load())
			return made, errors.Join(f.Truncate(spec.Size), sparse.Copy(ctx, f, of.File))
		},
	})
	defer store.Close()
	config := Config{Pool: n.pool, Templates: store, TargetRoot: n.kubelet, Warm: 1, WarmMost: 8}
	r := n.request("inline", "ext4", 64*mib)
	again := func(do func(n *node)) { n.withAnother(config, do) }
	again(func(n *node) {
		n.mustPublish(r)
		n.mustBeReady(1)
		n.mustUnpublish(r)
	})
	version.Add(1)
	again(func(n *node) {
		time.Sleep(50 * time.Millisecond)
		if ready, level := n.ready(); ready != 0 || level != 1 {
			t.Errorf("%d of %d are ready", ready, level)
		}
		n.mustPublish(r) // builds the template
		n.mustBeReady(1)
		n.mustUnpublish(r)
	})
}

// keyOf is the key of the only template.
func keyOf(t *testing.T, n *node) string {
	t.Helper()
	keys, err := n.pool.Templates()
	if err != nil || len(keys) != 1 {
		t.Fatal(keys, err)
	}
	return keys[0]
}

// TestWarmGaveUp asks for a volume when the filesystem that is ready has given up.
func TestWarmGaveUp(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			n := newNodeWith(t, testenv.XFS, 4<<30, Config{Warm: 1, WarmMost: 8})
			r, next := n.request("first", fs, warmSizes[fs]), n.request("next", fs, warmSizes[fs])
			n.mustPublish(r)
			n.mustBeReady(1)
			n.shutReady(fs)
			_, err := n.PublishInline(t.Context(), next)
			refused(t, "publish", err, errdefs.ErrUnderWay, "kept ready", "try again")
			n.mustPublish(next)
			if err := os.WriteFile(filepath.Join(next.Target, "file"), []byte("text"), 0o600); err != nil {
				t.Error(err)
			}
			n.mustUnpublish(r)
			n.mustUnpublish(next)
		})
	}
}

// TestWarmCovered asks for volumes while something is mounted over a pool with some that are ready.
func TestWarmCovered(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4<<30, Config{Warm: 1, WarmMost: 8})
	inline, first, second := n.request("inline", "ext4", 64*mib), claim("first", "ext4", 64*mib), claim("second", "ext4", 64*mib)
	n.mustPublish(inline)
	n.mustUnpublish(inline)
	v := n.mustCreate(first)
	n.mustBeReady(2)
	testenv.Run(t, "mount", "-t", "tmpfs", "cover", n.pool.Root())
	_, err := n.PublishInline(t.Context(), inline)
	refused(t, "publish", err, pool.ErrUnusable, "mounted over it")
	_, _, err = n.CreateClaim(t.Context(), second)
	refused(t, "create", err, pool.ErrUnusable, "mounted over it")
	testenv.Run(t, "umount", n.pool.Root())
	n.mustPublish(inline)
	n.mustUnpublish(inline)
	n.mustEnd(v)
}

// readyDevices are the loop devices of volumes that are kept ready.
func (n *node) readyDevices() (devices []int) {
	n.t.Helper()
	dir, err := os.Stat(n.images.Dir())
	if err != nil {
		n.t.Fatal(err)
	}
	ids, err := n.images.IDs()
	if err != nil {
		n.t.Fatal(err)
	}
	all, err := loopdev.Attached()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, index := range all {
		dev, err := loopdev.Open(index)
		if err != nil {
			continue // another program's, which is gone
		}
		info, err := dev.Info()
		dev.Close()
		if err == nil && info.Name == place.ReadyDevice && info.Device == dir.Sys().(*syscall.Stat_t).Dev && ids[image.FileID{Device: info.Device, Inode: info.Inode}] == "" {
			devices = append(devices, index)
		}
	}
	return devices
}

// shutReady shuts down the filesystem that is ready, as the kernel does after an error.
func (n *node) shutReady(fs string) {
	n.t.Helper()
	devices := n.readyDevices()
	if len(devices) != 1 {
		n.t.Fatalf("the devices %v are ready, want one", devices)
	}
	dev, err := loopdev.Open(devices[0])
	if err != nil {
		n.t.Fatal(err)
	}
	defer dev.Close()
	again, err := mount.New(mount.Config{FSType: fs, Source: dev.Path()})
	if err != nil {
		n.t.Fatal(err)
	}
	defer again.Close()
	root, err := mount.Open(again.File())
	if err == nil {
		err = errors.Join(fsctl.Shutdown(root), root.Close())
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// TestWarmLost takes the image of a volume away that was ready, and unpublishes the volume.
func TestWarmLost(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 4<<30, Config{Warm: 1, WarmMost: 8})
	first, r := n.request("first", "ext4", 64*mib), n.request("second", "ext4", 64*mib)
	n.mustPublish(first)
	n.mustBeReady(1)
	n.mustPublish(r)
	n.mustBeReady(1)
	if err := os.Remove(n.pool.Volume(r.ID)); err != nil {
		t.Fatal(err)
	}
	plan, err := n.Sweep(t.Context(), sweep.Options{DryRun: true})
	if err != nil || len(plan) != 1 || plan[0].Verb != sweep.Leave || !strings.Contains(plan[0].Reason, "an inline volume was deleted") || !strings.Contains(plan[0].Reason, r.Target) {
		t.Errorf("the sweep finds %+v, %v", plan, err)
	}
	n.mustUnpublish(r)
	if _, err := os.Lstat(r.Target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the target is still there: %v", err)
	}
	n.mustUnpublish(first)
}

// BenchmarkWarm compares volumes that are ready with others.
func BenchmarkWarm(b *testing.B) {
	cold := newNodeInMemory(b)
	m, err := NewManager(Config{Pool: cold.pool, Templates: cold.contents.templates, TargetRoot: cold.kubelet, Warm: 1, WarmMost: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	hot := &node{Manager: m, t: b, kubelet: cold.kubelet}
	for fs := range warmSizes {
		b.Run(fs, func(b *testing.B) {
			r := hot.request("volume", fs, 1<<30)
			hot.mustPublish(r)
			hot.mustUnpublish(r)
			took := map[*node]time.Duration{}
			for b.Loop() {
				for _, n := range []*node{cold, hot} {
					hot.mustBeReady(1)
					time.Sleep(20 * time.Millisecond)
					start := time.Now()
					n.mustPublish(r)
					took[n] += time.Since(start)
					n.mustUnpublish(r)
				}
			}
			b.ReportMetric(float64(took[cold].Microseconds())/float64(b.N), "cold-µs")
			b.ReportMetric(float64(took[hot].Microseconds())/float64(b.N), "warm-µs")
		})
	}
}

// BenchmarkWarmCost measures what a volume takes that is kept ready: the kernel's memory (its objects and stacks) and
// space of the pool, by giving 64 of them back.
func BenchmarkWarmCost(b *testing.B) {
	const many = 64
	for fs := range warmSizes {
		for _, gib := range []int64{1, 100} {
			b.Run(fmt.Sprintf("%s-%dGiB", fs, gib), func(b *testing.B) {
				n := newNodeWith(b, testenv.XFS, 8<<30, Config{Warm: many, WarmMost: many})
				r := n.request("first", fs, gib<<30)
				n.mustPublish(r)
				n.mustUnpublish(r)
				n.mustBeReady(many)
				memory, space := n.cost()
				n.contents.warm.stock.Drain()
				memoryAfter, spaceAfter := n.cost()
				for b.Loop() { // there is nothing to repeat
				}
				b.ReportMetric(float64(memory-memoryAfter)/many/1024, "memory-KiB")
				b.ReportMetric(float64(spaceAfter-space)/many/1024, "pool-KiB")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// cost is the kernel's memory at this moment, and what is free of the pool, in bytes.
func (n *node) cost() (memory, free int64) {
	n.t.Helper()
	if err := n.pool.Sync(); err != nil {
		n.t.Fatal(err)
	}
	has, err := n.pool.Space()
	if err != nil {
		n.t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var name string
		var kib int64
		fmt.Sscan(line, &name, &kib)
		if name == "Slab:" || name == "KernelStack:" || name == "Percpu:" {
			memory += kib << 10
		}
	}
	return memory, has.Available
}
