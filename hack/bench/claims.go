// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
)

// errBudget means that a curve was not followed to its end, because that took too long.
var errBudget = errors.New("it takes too long")

// claims measures the calls of the controller beside more and more claims, and then a plugin that starts with all of
// them. If making that many takes too long, the curve ends earlier, and the goals that need its end are not met.
func claims(ctx context.Context, b *bench, d *bed) error {
	budget := time.Now().Add(time.Duration(b.n(90, 30)) * time.Second)
	made := 0
	for _, at := range []int{1, 300, 1000, 3000, 5000, claimCount} {
		if b.o.quick && at > 1000 {
			break
		}
		n, err := d.createClaims(ctx, made, at, budget)
		made = n
		if errors.Is(err, errBudget) {
			b.say("%-10s %-8s only %d claims were made in the time for that", d.kind.name, "claims", made)
		} else if err != nil {
			return err
		}
		if made, err = b.besideClaims(ctx, d, made); err != nil {
			return err
		}
		if n < at {
			break
		}
	}
	return b.restartWith(ctx, d, made)
}

// createClaims creates claims until there are so many, 8 at once, and returns how many there are.
func (d *bed) createClaims(ctx context.Context, from, to int, until time.Time) (int, error) {
	var g errgroup.Group
	g.SetLimit(8)
	for i := from; i < to; i++ {
		if time.Now().After(until) {
			return i, errors.Join(g.Wait(), errBudget)
		}
		g.Go(func() error {
			_, err := d.createClaim(ctx, i)
			return err
		})
	}
	return to, g.Wait()
}

func (d *bed) createClaim(ctx context.Context, i int) (*csi.Volume, error) {
	return d.client.Create(ctx, harness.CreateRequest(fmt.Sprintf("claim-%d", i), volumeSize, harness.Mounted("ext4"), nil))
}

// besideClaims measures calls beside so many claims, and returns how many there are then.
func (b *bench) besideClaims(ctx context.Context, d *bed, made int) (int, error) {
	k := key{Case: "claims", Pool: d.kind.name, FS: "ext4", Way: plugin, At: made}
	measure := func(what string, call func() error) error {
		began := time.Now()
		if err := call(); err != nil {
			return fmt.Errorf("%s beside %d claims: %w", what, made, err)
		}
		k.What = what
		b.add(k, milliseconds(time.Since(began)))
		return nil
	}
	n := b.n(40, 15)
	for i := range n {
		err := measure("CreateVolume", func() error {
			_, err := d.createClaim(ctx, made+i)
			return err
		})
		if err == nil {
			err = measure("GetCapacity", func() error { return d.capacity(ctx) })
		}
		if err == nil && i%8 == 0 {
			err = measure("ListVolumes", func() error { return d.listAll(ctx, made+i+1) })
		}
		if err != nil {
			return 0, err
		}
	}
	return made + n, nil
}

func (d *bed) capacity(ctx context.Context) error {
	_, err := d.client.GetCapacity(ctx, &csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{harness.Mounted("ext4")}})
	return err
}

// listAll lists all volumes, page by page if the plugin has pages, and checks how many there are.
func (d *bed) listAll(ctx context.Context, want int) error {
	n, token := 0, ""
	for {
		answer, err := d.client.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: token})
		if err != nil {
			return err
		}
		n += len(answer.Entries)
		if token = answer.NextToken; token == "" {
			break
		}
	}
	if n != want {
		return fmt.Errorf("%d volumes are listed, not %d", n, want)
	}
	return nil
}

// restartWith measures a plugin that starts with so many volumes, its sweeps, and its memory afterwards.
func (b *bench) restartWith(ctx context.Context, d *bed, volumes int) error {
	k := key{Case: "claims", Pool: d.kind.name, FS: "ext4", Way: plugin, At: volumes}
	for range b.n(3, 1) {
		if err := d.Stop(stopTimeout); err != nil {
			return err
		}
		began := time.Now()
		if err := d.start(ctx, b.o.binary, "--sweep-interval", "1s"); err != nil {
			return err
		}
		k.What = "ready after restart"
		b.add(k, milliseconds(time.Since(began)))
		if err := b.sweeps(ctx, d, k); err != nil {
			return err
		}
		if err := d.listAll(ctx, volumes); err != nil {
			return err
		}
		rss, err := d.memory("VmRSS")
		if err != nil {
			return err
		}
		k.What = "RSS"
		b.add(k, rss)
	}
	return d.restart(ctx, b.o.binary)
}

var swept = regexp.MustCompile(`"Swept".* duration="([^"]+)"`)

// sweeps waits for the third sweep, and records how long each one took.
func (b *bench) sweeps(ctx context.Context, d *bed, k key) error {
	k.What = "sweep"
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		log, err := os.ReadFile(d.Log)
		if err != nil {
			return err
		}
		found := swept.FindAllSubmatch(log, -1)
		if len(found) < 3 && time.Now().Before(end) && ctx.Err() == nil {
			continue
		}
		if len(found) == 0 {
			return fmt.Errorf("the log tells of no sweep: %w", errors.Join(ctx.Err(), errors.New(d.Tail())))
		}
		for _, m := range found {
			took, err := time.ParseDuration(string(m[1]))
			if err != nil {
				return err
			}
			b.add(k, milliseconds(took))
		}
		return nil
	}
}
