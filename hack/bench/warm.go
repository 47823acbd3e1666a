// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// keeper is a second plugin, which keeps volumes ready, with a pool of its own on the same filesystem.
type keeper struct {
	*bed
}

// newKeeper starts a keeper. The caller closes it, whatever the error.
func (b *bench) newKeeper(ctx context.Context, d *bed, flags ...string) (keeper, error) {
	k := keeper{&bed{kind: d.kind, dir: d.dir, root: d.root, beside: d.beside}}
	k.node = harness.Node{Pool: filepath.Join(d.root, "ready"), Kubelet: d.node.Kubelet + "-ready"}
	if err := k.node.Make(); err != nil {
		return k, err
	}
	var err error
	if k.client, err = k.node.Connect(); err != nil {
		return k, err
	}
	return k, k.start(ctx, b.o.binary, append(slices.Clone(harness.AnyPort), flags...)...)
}

// close ends the plugin and removes its pool.
func (k keeper) close() error {
	var errs []error
	if k.client != nil {
		errs = append(errs, k.client.Conn.Close())
	}
	if k.Plugin != nil && k.Alive() {
		errs = append(errs, k.Stop(stopTimeout))
	}
	return errors.Join(append(errs, unmountBelow(k.node.Kubelet), os.RemoveAll(k.node.Kubelet), os.RemoveAll(k.node.Pool))...)
}

// full waits until all are ready that are to be.
func (k keeper) full(ctx context.Context) error {
	for end := time.Now().Add(readyTimeout); !k.AllReady(); time.Sleep(pause) {
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("volumes do not get ready: %w", errors.Join(ctx.Err(), errors.New(k.Tail())))
		}
	}
	return nil
}

// warmVolumes measures volumes that are ready.
func warmVolumes(ctx context.Context, b *bench, d *bed) (err error) {
	k, err := b.newKeeper(ctx, d, "--warm", "16", "--warm-max", "48") // no room for more than 16 of each
	defer func() { err = errors.Join(err, k.close()) }()
	if err != nil {
		return err
	}
	k.ways = map[string]way{ready: overCSI{k.client}}
	for _, fs := range filesystems {
		if err := b.once(ctx, k.bed, ready, k.volume(fs, volumeSize)); err != nil {
			return err
		}
	}
	for _, fs := range filesystems {
		at := key{Case: "warm", Pool: d.kind.name, FS: fs}
		if err := b.takeReady(ctx, d, k, at); err != nil {
			return err
		}
		if err := b.burst(ctx, d, k, at); err != nil {
			return err
		}
		if err := b.withoutRest(ctx, d, k, at); err != nil {
			return err
		}
	}
	return nil
}

// bedOf is the bed that has a way.
func (k keeper) bedOf(name string, d *bed) *bed {
	if name == ready {
		return k.bed
	}
	return d
}

// takeReady has the ways take turns. While one does, nothing is made ready.
func (b *bench) takeReady(ctx context.Context, d *bed, k keeper, at key) error {
	for i := range b.rounds(110, 20, 7*time.Second) {
		for _, name := range b.shuffled([]string{ready, plugin, floor, habit}) {
			if i%max(1, every[name]) != 0 {
				continue
			}
			if err := k.full(ctx); err != nil {
				return err
			}
			if err := b.round(ctx, k.bedOf(name, d), at, []string{name}, 0); err != nil {
				return err
			}
		}
		if err := b.nothing(ctx, k, at); err != nil {
			return err
		}
	}
	return nil
}

// nothing measures a call that does nothing, after the same rest: what gRPC and two processes that wake take.
func (b *bench) nothing(ctx context.Context, k keeper, at key) error {
	if err := k.full(ctx); err != nil {
		return err
	}
	time.Sleep(pause)
	began := time.Now()
	_, err := k.client.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	at.What, at.Way = "a call that does nothing", ready
	b.add(at, milliseconds(time.Since(began)))
	return err
}

// burst publishes 100 volumes at once, of which 16 are ready, or none.
func (b *bench) burst(ctx context.Context, d *bed, k keeper, at key) error {
	at.What = "publish, 100 at once"
	for range b.rounds(3, 1, 4*time.Second) {
		for _, name := range b.shuffled([]string{ready, plugin}) {
			if err := k.full(ctx); err != nil {
				return err
			}
			at.Way = name
			bed := k.bedOf(name, d)
			w, vs := bed.ways[name], bed.some(at.FS, 100)
			if err := each(len(vs), vs, w.prepare); err != nil {
				return err
			}
			var mu sync.Mutex
			err := each(len(vs), vs, func(v *volume) error {
				took, err := timed(ctx, v, w.publish)
				mu.Lock()
				defer mu.Unlock()
				b.add(at, milliseconds(took))
				return err
			})
			if err := errors.Join(err, b.takeAway(ctx, w, vs)); err != nil {
				return err
			}
			time.Sleep(10 * pause)
		}
	}
	return nil
}

// withoutRest measures lives one after the other. A plugin that keeps volumes ready makes them meanwhile.
func (b *bench) withoutRest(ctx context.Context, d *bed, k keeper, at key) error {
	const lives = 48
	at.What = "lives/s, without rest"
	for range b.rounds(3, 1, 4*time.Second) {
		for _, name := range b.shuffled([]string{ready, plugin}) {
			at.Way = name
			bed := k.bedOf(name, d)
			w := bed.ways[name]
			began := time.Now()
			err := each(1, bed.some(at.FS, lives), func(v *volume) error {
				_, _, err := b.live(ctx, w, v)
				return err
			})
			if err != nil {
				return err
			}
			b.add(at, lives/time.Since(began).Seconds())
			if err := k.full(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// durable measures the creation of claims.
func durable(ctx context.Context, b *bench, d *bed) (err error) {
	const claims = 64
	k, err := b.newKeeper(ctx, d, "--warm", fmt.Sprint(claims), "--warm-max", fmt.Sprint(claims))
	defer func() { err = errors.Join(err, k.close()) }()
	if err != nil {
		return err
	}
	for _, fs := range filesystems {
		at := key{Case: "durable", Pool: d.kind.name, FS: fs}
		create := map[string]func(*volume) error{
			ready:  k.createDurably(ctx),
			plugin: d.createDurably(ctx),
			floor:  d.cloneDurably,
		}
		first := k.volume(fs, volumeSize)
		if err := errors.Join(create[ready](first), k.forget(ctx, ready, first)); err != nil {
			return err
		}
		for range b.rounds(60, 10, 5*time.Second) {
			for _, name := range b.shuffled([]string{ready, plugin, floor}) {
				if err := k.full(ctx); err != nil {
					return err
				}
				v := d.volume(fs, volumeSize)
				took, err := timed(ctx, v, func(_ context.Context, v *volume) error { return create[name](v) })
				if err := errors.Join(err, k.bedOf(name, d).forget(ctx, name, v)); err != nil {
					return err
				}
				at.What, at.Way = "CreateVolume", name
				b.add(at, milliseconds(took))
				time.Sleep(pause)
			}
		}
		if err := b.createMany(ctx, k, at, claims, create[ready]); err != nil {
			return err
		}
	}
	return nil
}

// createMany creates claims that are ready, one by one and 32 at once.
func (b *bench) createMany(ctx context.Context, k keeper, at key, claims int, create func(*volume) error) error {
	at.Way = ready
	for range b.rounds(3, 1, 4*time.Second) {
		for what, workers := range map[string]int{"creates/s, one by one": 1, "creates/s, 32 at once": 32} {
			if err := k.full(ctx); err != nil {
				return err
			}
			vs := k.some(at.FS, claims)
			began := time.Now()
			if err := each(workers, vs, create); err != nil {
				return err
			}
			at.What = what
			b.add(at, float64(claims)/time.Since(began).Seconds())
			if err := each(8, vs, func(v *volume) error { return k.forget(ctx, ready, v) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// createDurably creates a claim by CSI.
func (d *bed) createDurably(ctx context.Context) func(*volume) error {
	return func(v *volume) error {
		made, err := d.client.Create(ctx, harness.CreateRequest(v.id, v.size, harness.Mounted(v.fs), nil))
		if err == nil {
			v.id = made.VolumeId
		}
		return err
	}
}

// cloneDurably is the floor: a clone with an identity that survives a power cut, file and name.
func (d *bed) cloneDurably(v *volume) error {
	dst, err := clone(d.templates, v, true)
	if err != nil {
		return err
	}
	defer dst.Close()
	dir, err := os.Open(filepath.Dir(v.image))
	if err != nil {
		return err
	}
	defer dir.Close()
	return errors.Join(dst.Sync(), dir.Sync())
}

// forget deletes what was created by a way.
func (d *bed) forget(ctx context.Context, name string, v *volume) error {
	if name == floor {
		return os.Remove(v.image)
	}
	return d.client.Delete(ctx, v.id)
}
