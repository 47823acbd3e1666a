// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	claimName    = idPrefix + "claim"
	snapshotName = idPrefix + "snapshot"
	restoredName = idPrefix + "restored"
	claimSize    = 1 << 30
	grownSize    = 2 << 30
)

// claims shows volumes that stay when their pod goes: a claim is made and used, a snapshot is taken while it is in use,
// and a larger claim is made of the snapshot.
func (d *demo) claims(ctx context.Context) error {
	say("Making a claim of %s, a snapshot of it while it is in use, and a larger claim of that.", volumeSize)
	original := d.newClaim(claimName)
	if err := timed("claim made, durably", func() error { return original.create(ctx, d, claimSize, "") }); err != nil {
		return err
	}
	if err := timed("staged and published", func() error { return original.use(ctx, d) }); err != nil {
		return err
	}
	if err := original.write(); err != nil {
		return err
	}
	if err := timed("snapshot, of the mounted filesystem", func() error {
		_, err := d.Snapshot(ctx, snapshotName, original.ID)
		return err
	}); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(original.Target, "greeting"), []byte("changed since"), 0o644); err != nil {
		return err
	}
	restored := d.newClaim(restoredName)
	if err := timed("claim of 2Gi made of the snapshot", func() error { return restored.create(ctx, d, grownSize, snapshotName) }); err != nil {
		return err
	}
	if err := timed("staged, grown and published beside it", func() error { return restored.use(ctx, d) }); err != nil {
		return err
	}
	if err := restored.compare(original); err != nil {
		return err
	}
	if err := errors.Join(restored.end(ctx, d), original.end(ctx, d), d.deleteSnapshot(ctx)); err != nil {
		return err
	}
	detail("nothing is left of them")
	return d.left(0)
}

// timed does something and prints how long it took.
func timed(what string, do func() error) error {
	began := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	detail("%9s  %s", seconds(time.Since(began)), what)
	return nil
}

// claim is a volume that stays when its pod goes.
type claim struct{ vol }

func (d *demo) newClaim(name string) *claim {
	return &claim{vol{fs: "ext4", magic: unix.EXT4_SUPER_MAGIC, greeting: "I stay", Volume: d.Claim(name, harness.Mounted("ext4"), name)}}
}

func (c *claim) create(ctx context.Context, d *demo, bytes int64, snapshot string) error {
	r := harness.CreateRequest(c.ID, bytes, c.Capability, nil)
	if snapshot != "" {
		r.VolumeContentSource = harness.FromSnapshot(snapshot)
	}
	_, err := d.Create(ctx, r)
	return err
}

// use stages the claim and publishes it to a pod.
func (c *claim) use(ctx context.Context, d *demo) error {
	if err := c.MakeDirs(); err != nil {
		return err
	}
	if err := d.Stage(ctx, c.Volume); err != nil {
		return err
	}
	return d.Publish(ctx, c.Volume)
}

// compare checks a restored claim: it has the original's files as they were at the snapshot, in a filesystem of its own,
// of its own size.
func (c *claim) compare(original *claim) error {
	random, err := os.ReadFile(filepath.Join(original.Target, "random"))
	if err != nil {
		return err
	}
	for name, want := range map[string][]byte{"greeting": []byte(original.greeting), "random": random} {
		got, err := os.ReadFile(filepath.Join(c.Target, name))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%s: the file %s is not what it was when the snapshot was taken", c.ID, name)
		}
	}
	_, id, err := c.mounted()
	if err != nil {
		return err
	}
	_, other, err := original.mounted()
	if err != nil {
		return err
	}
	if id == other {
		return fmt.Errorf("%s and %s have the same UUID %s", c.ID, original.ID, id)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(c.Target, &st); err != nil {
		return err
	}
	total := int64(st.Blocks) * st.Bsize
	if total < grownSize*9/10 {
		return fmt.Errorf("%s has %s, expected %s", c.ID, size.Format(total), size.Format(grownSize))
	}
	detail("           it has the files of then, a UUID of its own, and %s", size.Format(total))
	return nil
}

// end removes a claim for good. It does nothing for a claim that is gone already.
func (c *claim) end(ctx context.Context, d *demo) error {
	if err := d.Unpublish(ctx, c.Volume); err != nil {
		return fmt.Errorf("unpublishing %s: %w", c.ID, err)
	}
	if err := d.Unstage(ctx, c.Volume); err != nil {
		return fmt.Errorf("unstaging %s: %w", c.ID, err)
	}
	if err := d.Delete(ctx, c.ID); err != nil {
		return fmt.Errorf("deleting %s: %w", c.ID, err)
	}
	return nil
}

func (d *demo) deleteSnapshot(ctx context.Context) error {
	_, err := d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshotName})
	return err
}
