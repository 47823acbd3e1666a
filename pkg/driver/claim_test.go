// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// claimed is a claim as kubelet knows it.
type claimed struct {
	*csi.Volume
	capability *csi.VolumeCapability
	staging    string
	target     string
}

// create makes a claim and the directories that kubelet makes for it.
func (p *plugin) create(req *csi.CreateVolumeRequest) (*claimed, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	r, err := p.CreateVolume(ctx, req)
	if err != nil {
		return nil, err
	}
	c := &claimed{Volume: r.GetVolume(), capability: req.VolumeCapabilities[0]}
	c.staging = filepath.Join(p.kubelet, "plugins", "kubernetes.io", "csi", c.VolumeId, "globalmount")
	dir := filepath.Join(p.kubelet, "pods", "uid-of-"+c.VolumeId, "volumes", "kubernetes.io~csi", c.VolumeId)
	c.target = filepath.Join(dir, "mount")
	return c, errors.Join(os.MkdirAll(c.staging, 0o750), os.MkdirAll(dir, 0o750))
}

func (p *plugin) stage(c *claimed) error {
	_, err := p.NodeStageVolume(p.t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: c.VolumeId, StagingTargetPath: c.staging, VolumeCapability: c.capability, VolumeContext: c.VolumeContext,
	})
	return err
}

func (p *plugin) publishClaim(c *claimed) error {
	_, err := p.NodePublishVolume(p.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: c.VolumeId, StagingTargetPath: c.staging, TargetPath: c.target, VolumeCapability: c.capability, VolumeContext: c.VolumeContext,
	})
	return err
}

// end takes a claim away: from its pod, from the node, and for good.
func (p *plugin) end(c *claimed) error {
	ctx := p.t.Context()
	_, unpublish := p.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: c.VolumeId, TargetPath: c.target})
	_, unstage := p.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: c.VolumeId, StagingTargetPath: c.staging})
	_, del := p.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: c.VolumeId})
	return errors.Join(unpublish, unstage, del)
}

func (p *plugin) mustCreate(req *csi.CreateVolumeRequest) *claimed {
	p.t.Helper()
	c, err := p.create(req)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// TestManyClaims has 200 claims of all forms at once, 16 calls at a time.
func TestManyClaims(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newNode(t, kind, 128<<30).start("-v", "2")
			requests := []*csi.CreateVolumeRequest{
				create(mounted("ext4")), create(mounted("xfs")), create(mounted("btrfs")), create(device()),
				create(mounted("ext4"), paramPublishAs, "diskImage"), create(device(), paramProvisioning, "thick"),
			}
			for _, r := range requests { // templates take a VM, which is not what is looked at
				r.Name, r.CapacityRange = "warm", &csi.CapacityRange{RequiredBytes: 300 * mib}
				if err := p.end(p.mustCreate(r)); err != nil {
					t.Fatal(err)
				}
			}
			claims := make([]*claimed, 200)
			start := time.Now()
			inParallel(len(claims), func(i int) {
				template := requests[i%len(requests)]
				r := &csi.CreateVolumeRequest{
					Name: fmt.Sprintf("pvc-%d", i), VolumeCapabilities: template.VolumeCapabilities,
					Parameters: template.Parameters, CapacityRange: template.CapacityRange,
				}
				c, err := p.create(r)
				if err != nil {
					t.Error(err)
					return
				}
				claims[i] = c
				if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
					t.Errorf("%s: %v", c.VolumeId, err)
				}
			})
			t.Logf("200 claims in use after %s", time.Since(start).Round(time.Millisecond))
			if t.Failed() {
				return
			}
			if loops := testenv.LoopsBelow(t, p.pool); len(loops) != 200-33 { // all but the disk images
				t.Errorf("%d loop devices", len(loops))
			}
			start = time.Now()
			inParallel(len(claims), func(i int) {
				if err := p.end(claims[i]); err != nil {
					t.Errorf("%s: %v", claims[i].VolumeId, err)
				}
			})
			t.Logf("gone after %s", time.Since(start).Round(time.Millisecond))
			p.mustHave("none")
			for _, c := range claims {
				if _, err := os.Lstat(c.target); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("target %s is still there: %v", c.target, err)
				}
			}
			if list, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(list.GetEntries()) > 0 {
				t.Errorf("volumes %v: %v", list, err)
			}
		})
	}
}

// inParallel calls f with 0 to n-1, 16 at a time.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range 16 {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// TestClaims goes through gRPC with what package volume's own tests do not see:
// codes, topology, capacity, tokens, health, and a plugin that is killed between
// any two calls.
func TestClaims(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 16<<30)
			p := n.start()
			for _, test := range []struct {
				name string
				run  func(*plugin)
			}{
				{"capacity", capacity},
				{"validate", validate},
				{"refused", refusedClaims},
				{"snapshots", snapshots},
				{"expansion", expansion},
				{"health", volumeHealth},
			} {
				t.Run(test.name, func(t *testing.T) {
					p := p.with(t)
					p.mustKeep(func() { test.run(p) })
				})
			}
			t.Run("killed between the calls", func(t *testing.T) { killedBetween(p.with(t)) })
		})
	}
}

func capacity(p *plugin) {
	t := p.t
	ask := func(req *csi.GetCapacityRequest) *csi.GetCapacityResponse {
		t.Helper()
		r, err := p.GetCapacity(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	all := ask(&csi.GetCapacityRequest{})
	if a := all.GetAvailableCapacity(); a < 14<<30 || a > 16<<30 || all.GetMaximumVolumeSize().GetValue() != a || all.GetMinimumVolumeSize().GetValue() != 9*mib {
		t.Errorf("of 16 GiB: %v", all)
	}
	here := &csi.Topology{Segments: map[string]string{TopologyKey: "node-of-test"}}
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: here, Parameters: map[string]string{paramProvisioning: "thick"}}); r.GetAvailableCapacity() < 14<<30 {
		t.Errorf("here, thick: %v", r)
	}
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{TopologyKey: "other"}}}); r.GetAvailableCapacity() != 0 || r.GetMaximumVolumeSize().GetValue() != 0 {
		t.Errorf("elsewhere: %v", r)
	}
	if r := ask(&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{mounted("xfs")}}); r.GetMinimumVolumeSize().GetValue() != 300*mib {
		t.Errorf("xfs: %v", r)
	}
	// As the provisioner asks, today and before it left the capabilities out.
	if r := ask(&csi.GetCapacityRequest{Parameters: map[string]string{paramFormat: "xfs", paramLabel: "x"}}); r.GetAvailableCapacity() < 14<<30 || r.GetMinimumVolumeSize().GetValue() != 300*mib {
		t.Errorf("formatted disks: %v", r)
	}
	old := mounted("")
	old.AccessMode = nil
	for _, params := range []map[string]string{nil, {paramFormat: "ext4"}} {
		if r := ask(&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{old}, Parameters: params}); r.GetAvailableCapacity() < 14<<30 {
			t.Errorf("without an access mode, %v: %v", params, r)
		}
	}
	// A class that will be refused must get as far as that.
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: here, Parameters: map[string]string{"siez": "1"}}); r.GetAvailableCapacity() < 14<<30 {
		t.Errorf("of a bad class: %v", r)
	}

	req := create(device())
	req.CapacityRange = &csi.CapacityRange{RequiredBytes: 4 << 30}
	c := p.mustCreate(req)
	if got := ask(&csi.GetCapacityRequest{}); all.GetAvailableCapacity()-got.GetAvailableCapacity() < 4<<30 {
		t.Errorf("with a claim of 4 GiB: %v, before %v", got, all)
	}
	if c.CapacityBytes != 4<<30 || len(c.AccessibleTopology) != 1 || c.AccessibleTopology[0].Segments[TopologyKey] != "node-of-test" {
		t.Errorf("volume %v", c.Volume)
	}
	req.Name = "too-large"
	req.CapacityRange.RequiredBytes = 64 << 30
	_, err := p.CreateVolume(t.Context(), req)
	t.Log(err)
	mustSay(t, err, codes.ResourceExhausted, "64Gi asked for", "overcommit", "clean-all")
	if err := p.end(c); err != nil {
		t.Error(err)
	}
	info, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil || info.GetMaxVolumesPerNode() != 1024 {
		t.Errorf("node info %v: %v", info, err)
	}
}

func validate(p *plugin) {
	t := p.t
	c := p.mustCreate(create(mounted("ext4")))
	ask := func(caps ...*csi.VolumeCapability) *csi.ValidateVolumeCapabilitiesResponse {
		t.Helper()
		r, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: c.VolumeId, VolumeCapabilities: caps})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ask(mounted("ext4"), mounted("")); len(r.GetConfirmed().GetVolumeCapabilities()) != 2 {
		t.Errorf("good ones: %v", r)
	}
	for name, cap := range map[string]*csi.VolumeCapability{"block": device(), "xfs": mounted("xfs")} {
		if r := ask(cap); r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), c.VolumeId) {
			t.Errorf("%s: %v", name, r)
		}
	}
	for name, params := range map[string]map[string]string{
		"thick": {paramProvisioning: "thick"}, "xfs parameter": {paramFSType: "xfs"}, "disk image": {paramPublishAs: "diskImage"},
	} {
		r, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: c.VolumeId, VolumeCapabilities: []*csi.VolumeCapability{mounted("")}, Parameters: params})
		if err != nil || r.GetConfirmed() != nil || r.GetMessage() == "" {
			t.Errorf("%s: %v %v", name, r, err)
		}
	}
	many := mounted("")
	many.AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	if r := ask(many); r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), "SINGLE_NODE") {
		t.Errorf("many nodes: %v", r)
	}
	got, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.VolumeId})
	if err != nil || got.GetVolume().GetCapacityBytes() != 256*mib || got.GetStatus() == nil {
		t.Errorf("get %v: %v", got, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
	_, err = p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.VolumeId})
	mustSay(t, err, codes.NotFound, c.VolumeId)
}

// refusedClaims: each with its code and the node as it was.
func refusedClaims(p *plugin) {
	t := p.t
	elsewhere := create(mounted(""))
	elsewhere.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "other"}}}}
	small := create(mounted("xfs"))
	small.CapacityRange = &csi.CapacityRange{RequiredBytes: mib}
	limited := create(mounted("xfs"))
	limited.CapacityRange = &csi.CapacityRange{LimitBytes: 100 * mib}
	source := create(mounted(""))
	source.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "none"}}}
	away := proto.CloneOf(source)
	away.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "node-of-test"}}}}
	for name, c := range map[string]struct {
		req  *csi.CreateVolumeRequest
		code codes.Code
		says []string
	}{
		"elsewhere":    {elsewhere, codes.ResourceExhausted, []string{TopologyKey, "node-of-test"}},
		"too small":    {small, codes.OutOfRange, []string{"capacity_range", "xfs", "300Mi"}},
		"limited":      {limited, codes.OutOfRange, []string{"limit_bytes", "104857600", "xfs"}},
		"parameter":    {create(mounted(""), "color", "red"), codes.InvalidArgument, []string{`"color"`}},
		"not here":     {away, codes.ResourceExhausted, []string{"snapshot none", "node"}},
		"no source":    {source, codes.NotFound, []string{"snapshot", "none"}},
		"unknown name": {create(mounted("hfs")), codes.InvalidArgument, []string{`"hfs"`}},
	} {
		_, err := p.CreateVolume(t.Context(), c.req)
		t.Logf("%s: %v", name, err)
		mustSay(t, err, c.code, c.says...)
	}
	staging := filepath.Join(p.kubelet, "plugins")
	if err := os.MkdirAll(staging, 0o750); err != nil {
		t.Fatal(err)
	}
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: "unknown", StagingTargetPath: staging, VolumeCapability: mounted("")})
	mustSay(t, err, codes.NotFound, "unknown")
	_, err = p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: "unknown", StagingTargetPath: staging, TargetPath: p.target("unknown"), VolumeCapability: mounted("")})
	mustSay(t, err, codes.NotFound, "unknown")
	_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: "unknown", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
	mustSay(t, err, codes.NotFound, "unknown")

	// One volume, two calls at once.
	c := p.mustCreate(create(mounted("ext4")))
	wrong := *c
	wrong.capability = device()
	mustSay(t, p.stage(&wrong), codes.FailedPrecondition, "volumeMode")
	if err := p.stage(c); err != nil {
		t.Fatal(err)
	}
	_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: c.VolumeId})
	t.Log(err)
	mustSay(t, err, codes.FailedPrecondition, "in use", "unstage")
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}

func snapshots(p *plugin) {
	t := p.t
	c := p.mustCreate(create(mounted("ext4")))
	if err := errors.Join(p.stage(c), p.publishClaim(c), os.WriteFile(filepath.Join(c.target, "file"), []byte("kept"), 0o600)); err != nil {
		t.Fatal(err)
	}
	req := &csi.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: c.VolumeId, Parameters: map[string]string{kubeletPrefix + "volumesnapshot/name": "s"}}
	r, err := p.CreateSnapshot(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	s := r.GetSnapshot()
	if !s.GetReadyToUse() || s.GetSizeBytes() != 256*mib || s.GetSourceVolumeId() != c.VolumeId || time.Since(s.GetCreationTime().AsTime()) > time.Minute {
		t.Errorf("snapshot %v", s)
	}
	req.Parameters["speed"] = "high"
	_, err = p.CreateSnapshot(t.Context(), req)
	mustSay(t, err, codes.InvalidArgument, `"speed"`)
	for what, want := range map[*csi.ListSnapshotsRequest]int{
		{}: 1, {SnapshotId: s.SnapshotId}: 1, {SnapshotId: "none"}: 0, {SourceVolumeId: c.VolumeId}: 1, {SourceVolumeId: "none"}: 0,
		{SnapshotId: s.SnapshotId, SourceVolumeId: "none"}: 0,
	} {
		if l, err := p.ListSnapshots(t.Context(), what); err != nil || len(l.GetEntries()) != want {
			t.Errorf("%v: %v %v", what, l, err)
		}
	}
	restore := create(mounted(""))
	restore.Name = "restored"
	restore.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: s.SnapshotId}}}
	restored := p.mustCreate(restore)
	if restored.GetContentSource().GetSnapshot().GetSnapshotId() != s.SnapshotId {
		t.Errorf("restored %v", restored.Volume)
	}
	if err := errors.Join(p.stage(restored), p.publishClaim(restored)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(restored.target, "file")); string(b) != "kept" {
		t.Errorf("restored has %q: %v", b, err)
	}
	if err := errors.Join(p.end(restored), p.end(c)); err != nil {
		t.Error(err)
	}
	for range 2 {
		if _, err := p.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: s.SnapshotId}); err != nil {
			t.Error(err)
		}
	}
	_, err = p.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.SnapshotId})
	mustSay(t, err, codes.NotFound, s.SnapshotId)
}

func expansion(p *plugin) {
	t := p.t
	for name, c := range map[string]*claimed{"xfs": p.mustCreate(create(mounted("xfs"))), "image": p.mustCreate(func() *csi.CreateVolumeRequest {
		r := create(mounted("ext4"), paramPublishAs, "diskImage")
		r.Name = "image"
		return r
	}())} {
		if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
			t.Fatal(err)
		}
		size := &csi.CapacityRange{RequiredBytes: 1 << 30}
		r, err := p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.VolumeId, CapacityRange: size, VolumeCapability: c.capability})
		if err != nil || r.GetCapacityBytes() != 1<<30 || r.GetNodeExpansionRequired() != (name == "xfs") {
			t.Errorf("%s: %v: %v", name, r, err)
		}
		node, err := p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: c.VolumeId, VolumePath: c.target, StagingTargetPath: c.staging, CapacityRange: size, VolumeCapability: c.capability})
		if err != nil || node.GetCapacityBytes() != 1<<30 {
			t.Errorf("%s on the node: %v: %v", name, node, err)
		}
		_, err = p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: c.VolumeId, VolumePath: c.target, VolumeCapability: device()})
		mustSay(t, err, codes.InvalidArgument, "block")
		_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.VolumeId, CapacityRange: size, VolumeCapability: device()})
		mustSay(t, err, codes.InvalidArgument, "block")
		_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.VolumeId, CapacityRange: &csi.CapacityRange{LimitBytes: 512 * mib}})
		t.Log(err)
		mustSay(t, err, codes.OutOfRange, "do not shrink")
		if err := p.end(c); err != nil {
			t.Error(err)
		}
	}
}

func volumeHealth(p *plugin) {
	t := p.t
	c := p.mustCreate(create(mounted("xfs")))
	if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
		t.Fatal(err)
	}
	list := func() []*csi.VolumeHealth {
		t.Helper()
		r, err := p.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{MaxEntries: 1})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetEntries()
	}
	if l := list(); len(l) > 0 {
		t.Errorf("healthy: %v", l)
	}
	testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", c.target)
	r, err := p.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: c.VolumeId, VolumePublishPath: c.target, StagingTargetPath: c.staging})
	if h := r.GetVolumeHealth().GetHealthStatuses(); err != nil || len(h) != 1 || h[0].GetStatus() != csi.VolumeHealthErrorType_INACCESSIBLE || h[0].GetReason() != "FilesystemShutDown" {
		t.Errorf("shut down: %v: %v", r, err)
	}
	if l := list(); len(l) != 1 || l[0].GetVolumeId() != c.VolumeId {
		t.Errorf("shut down: %v", l)
	}
	if s, err := p.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{}); err != nil || len(s.GetBackendHealth()) > 0 {
		t.Errorf("the pool: %v: %v", s, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}

// killedBetween starts another plugin for each call.
func killedBetween(p *plugin) {
	t := p.t
	req := create(device(), paramProvisioning, "thick")
	fs := create(mounted("ext4"))
	fs.Name = "filesystem"
	again := func() {
		p.kill()
		p = p.node.start()
	}
	var claims []*claimed
	for _, r := range []*csi.CreateVolumeRequest{req, fs} {
		claims = append(claims, p.mustCreate(r))
		again()
		if c := p.mustCreate(r); c.VolumeId != claims[len(claims)-1].VolumeId {
			t.Errorf("volume %v", c)
		}
	}
	for _, step := range []func(*claimed) error{
		func(c *claimed) error { return p.stage(c) },
		func(c *claimed) error { return p.publishClaim(c) },
		func(c *claimed) error { return errors.Join(p.stage(c), p.publishClaim(c)) },
		func(c *claimed) error {
			_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: c.VolumeId, TargetPath: c.target})
			return err
		},
		func(c *claimed) error {
			_, err := p.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: c.VolumeId, StagingTargetPath: c.staging})
			return err
		},
		func(c *claimed) error { return p.end(c) },
	} {
		for _, c := range claims {
			if err := step(c); err != nil {
				t.Error(err)
			}
		}
		again()
	}
	p.mustHave("none")
	if code := p.terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestSharedResizer asks a plugin about a volume of another node, as the one
// external-resizer of a cluster does.
func TestSharedResizer(t *testing.T) {
	p := newNode(t, testenv.XFS, 4<<30).start("--shared-resizer")
	ask := func(id string) (*csi.ControllerExpandVolumeResponse, error) {
		return p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30}})
	}
	r, err := ask("pvc-of-another-node")
	if err != nil || r.GetCapacityBytes() != 1<<30 || !r.GetNodeExpansionRequired() {
		t.Errorf("of another node: %v, %v", r, err)
	}
	c := p.mustCreate(create(mounted("xfs")))
	if r, err := ask(c.VolumeId); err != nil || r.GetCapacityBytes() != 1<<30 {
		t.Errorf("of this node: %v, %v", r, err)
	}
	if v, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.VolumeId}); err != nil || v.GetVolume().GetCapacityBytes() != 1<<30 {
		t.Errorf("it did not grow: %v, %v", v, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}
