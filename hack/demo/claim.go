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

	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

const (
	claimName    = idPrefix + "claim"
	snapshotName = idPrefix + "snapshot"
	restoredName = idPrefix + "restored"
	grownSize    = 2 << 30
)

// claims shows what stays when its pod goes: a claim is made, used, snapshotted
// while it is in use, and made again of the snapshot, larger.
func (d *demo) claims(ctx context.Context) error {
	say("Making a claim of %s, a snapshot of it while it is in use, and a larger claim of that.", volumeSize)
	original := newClaimed(claimName)
	if err := d.timed("claim made, durably", func() error { return original.create(ctx, d, 1<<30, "") }); err != nil {
		return err
	}
	if err := d.timed("staged and published", func() error { return original.publish(ctx, d) }); err != nil {
		return err
	}
	if err := original.write(); err != nil {
		return err
	}
	if err := d.timed("snapshot, of the mounted filesystem", func() error {
		_, err := d.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: snapshotName, SourceVolumeId: original.id})
		return err
	}); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(original.target, "greeting"), []byte("changed since"), 0o644); err != nil {
		return err
	}
	restored := newClaimed(restoredName)
	if err := d.timed("claim of 2Gi made of the snapshot", func() error { return restored.create(ctx, d, grownSize, snapshotName) }); err != nil {
		return err
	}
	if err := d.timed("staged, grown and published beside it", func() error { return restored.publish(ctx, d) }); err != nil {
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
func (d *demo) timed(what string, do func() error) error {
	began := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	detail("%9s  %s", seconds(time.Since(began)), what)
	return nil
}

// claimed is a claim, with the paths that kubelet would have for it.
type claimed struct {
	vol
	staging string
}

func newClaimed(name string) *claimed {
	return &claimed{
		vol: vol{
			fs: "ext4", magic: unix.EXT4_SUPER_MAGIC, id: name, greeting: "I stay",
			target: filepath.Join(kubeletDir, "pods", name, "volumes", "kubernetes.io~csi", name, "mount"),
		},
		staging: filepath.Join(kubeletDir, "plugins", "kubernetes.io", "csi", "csi.disktemplate.io", name, "globalmount"),
	}
}

func (c *claimed) capability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: c.fs}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
	}
}

func (c *claimed) create(ctx context.Context, d *demo, size int64, snapshot string) error {
	req := &csi.CreateVolumeRequest{
		Name:               c.id,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: size},
		VolumeCapabilities: []*csi.VolumeCapability{c.capability()},
	}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot},
		}}
	}
	_, err := d.controller.CreateVolume(ctx, req)
	return err
}

func (c *claimed) publish(ctx context.Context, d *demo) error {
	if err := errors.Join(os.MkdirAll(c.staging, 0o750), os.MkdirAll(filepath.Dir(c.target), 0o750)); err != nil {
		return err
	}
	if _, err := d.node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: c.id, StagingTargetPath: c.staging, VolumeCapability: c.capability(),
	}); err != nil {
		return err
	}
	_, err := d.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: c.id, StagingTargetPath: c.staging, TargetPath: c.target, VolumeCapability: c.capability(),
	})
	return err
}

// compare holds a restored claim against its original: the same files as then, in
// a filesystem of its own, of its own size.
func (c *claimed) compare(original *claimed) error {
	for name, want := range map[string]func() ([]byte, error){
		"greeting": func() ([]byte, error) { return []byte(original.greeting), nil }, // as it was
		"random":   func() ([]byte, error) { return os.ReadFile(filepath.Join(original.target, "random")) },
	} {
		w, err := want()
		if err != nil {
			return err
		}
		got, err := os.ReadFile(filepath.Join(c.target, name))
		if err != nil {
			return err
		}
		if !bytes.Equal(got, w) {
			return fmt.Errorf("%s: the file %s is not what it was when the snapshot was taken", c.id, name)
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
		return fmt.Errorf("%s and %s have the same UUID %s", c.id, original.id, id)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(c.target, &st); err != nil {
		return err
	}
	if total := int64(st.Blocks) * st.Bsize; total < grownSize*9/10 {
		return fmt.Errorf("%s has %s, not 2Gi", c.id, size(total))
	}
	detail("           it has the files of then, a UUID of its own, and %s", size(int64(st.Blocks)*st.Bsize))
	return nil
}

// end takes a claim away for good. What is gone already is fine.
func (c *claimed) end(ctx context.Context, d *demo) error {
	if err := d.unpublishOne(ctx, c.id, c.target); err != nil {
		return err
	}
	if _, err := d.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: c.id, StagingTargetPath: c.staging}); err != nil {
		return fmt.Errorf("unstaging %s: %w", c.id, err)
	}
	if _, err := d.controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: c.id}); err != nil {
		return fmt.Errorf("deleting %s: %w", c.id, err)
	}
	return nil
}

func (d *demo) deleteSnapshot(ctx context.Context) error {
	_, err := d.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshotName})
	return err
}

// sweepOne takes away a volume of an earlier run.
func (d *demo) sweepOne(ctx context.Context, path string) error {
	var r volume.Record
	if err := readRecord(path, pool.VolumeAttr, &r); err != nil {
		return err
	}
	if r.Lifecycle == volume.Persistent {
		return newClaimed(r.ID).end(ctx, d)
	}
	return d.unpublishOne(ctx, r.ID, r.Target)
}
