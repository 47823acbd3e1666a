// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// The parts of TestClaims that one plugin lives through.

// capacity asks for the space that there is for new claims.
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
	if a := all.GetAvailableCapacity(); a < 6<<30 || a > 8<<30 || all.GetMaximumVolumeSize().GetValue() != a || all.GetMinimumVolumeSize().GetValue() != 9*mib {
		t.Errorf("of 8 GiB: %v", all)
	}
	here := &csi.Topology{Segments: map[string]string{TopologyKey: "node-of-test"}}
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: here, Parameters: map[string]string{paramProvisioning: "thick"}}); r.GetAvailableCapacity() < 6<<30 {
		t.Errorf("here, thick: %v", r)
	}
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{TopologyKey: "other"}}}); r.GetAvailableCapacity() != 0 || r.GetMaximumVolumeSize().GetValue() != 0 {
		t.Errorf("elsewhere: %v", r)
	}
	if r := ask(&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{mounted("xfs")}}); r.GetMinimumVolumeSize().GetValue() != 300*mib {
		t.Errorf("xfs: %v", r)
	}
	// The provisioner asks without capabilities. It used to send some without an access mode.
	if r := ask(&csi.GetCapacityRequest{Parameters: map[string]string{paramFormat: "xfs", paramLabel: "x"}}); r.GetAvailableCapacity() < 6<<30 || r.GetMinimumVolumeSize().GetValue() != 300*mib {
		t.Errorf("formatted disks: %v", r)
	}
	old := mounted("")
	old.AccessMode = nil
	for _, params := range []map[string]string{nil, {paramFormat: "ext4"}} {
		if r := ask(&csi.GetCapacityRequest{VolumeCapabilities: []*csi.VolumeCapability{old}, Parameters: params}); r.GetAvailableCapacity() < 6<<30 {
			t.Errorf("without an access mode, %v: %v", params, r)
		}
	}
	// A wrong class must reach CreateVolume, which says what is wrong: the scheduler must see space.
	if r := ask(&csi.GetCapacityRequest{AccessibleTopology: here, Parameters: map[string]string{"siez": "1"}}); r.GetAvailableCapacity() < 6<<30 {
		t.Errorf("of a bad class: %v", r)
	}

	req := create(device())
	req.CapacityRange = &csi.CapacityRange{RequiredBytes: 4 << 30}
	c := p.mustCreate(req)
	if got := ask(&csi.GetCapacityRequest{}); all.GetAvailableCapacity()-got.GetAvailableCapacity() < 4<<30 {
		t.Errorf("with a claim of 4 GiB: %v, before %v", got, all)
	}
	if c.created.CapacityBytes != 4<<30 || len(c.created.AccessibleTopology) != 1 || c.created.AccessibleTopology[0].Segments[TopologyKey] != "node-of-test" {
		t.Errorf("volume %v", c.created)
	}
	req.Name = "too-large"
	req.CapacityRange.RequiredBytes = 64 << 30
	_, err := p.CreateVolume(t.Context(), req)
	t.Log(err)
	mustSay(t, err, codes.ResourceExhausted, "64Gi is asked for", "overcommit", "drop cached templates (`csi-disktemplate clean-all --pool "+p.Pool+"`)")
	if err := p.end(c); err != nil {
		t.Error(err)
	}
	info, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil || info.GetMaxVolumesPerNode() != 1024 {
		t.Errorf("node info %v: %v", info, err)
	}
}

// smallClaims asks for less than filesystems take, as KubeVirt does for the state of a VM, and clones the claims with the
// same request.
func smallClaims(p *plugin) {
	t := p.t
	for fs, smallest := range map[string]int64{"ext4": 10 * mib, "xfs": 300 * mib, "btrfs": 109 * mib} {
		req := create(mounted(fs))
		req.Name, req.CapacityRange = "state-"+fs, &csi.CapacityRange{RequiredBytes: 10 * mib, LimitBytes: smallest}
		c, again := p.mustCreate(req), p.mustCreate(req)
		req.Name, req.VolumeContentSource = "clone-"+fs, harness.FromVolume(c.ID)
		clone := p.mustCreate(req)
		for _, v := range []*claimed{c, again, clone} {
			if v.created.CapacityBytes != smallest {
				t.Errorf("%s on %s: %d bytes", v.ID, fs, v.created.CapacityBytes)
			}
		}
		if err := errors.Join(p.stage(c), p.publishClaim(c), p.end(c), p.end(clone)); err != nil {
			t.Error(err)
		}
	}
}

// formattedClaims asks for mounted claims of a class for disks, as CDI does for scratch space. The capability has the
// filesystem that the provisioner fills in, and so has kubelet's.
func formattedClaims(p *plugin) {
	t := p.t
	for fs, magic := range map[string]int64{"xfs": 0x58465342, "btrfs": 0x9123683e, "none": 0xef53} { // statfs(2)
		req := create(mounted("ext4"), paramFormat, fs)
		req.Name, req.CapacityRange = "scratch-"+fs, &csi.CapacityRange{RequiredBytes: 300 * mib}
		c := p.mustCreate(req)
		if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
			t.Fatal(err)
		}
		var st syscall.Statfs_t
		if err := syscall.Statfs(c.Target, &st); err != nil || int64(st.Type) != magic {
			t.Errorf("format %s: %#x: %v", fs, st.Type, err)
		}
		if err := p.end(c); err != nil {
			t.Error(err)
		}
	}
}

// copiesOfAnyClass restores snapshots by a class that names another filesystem, as CDI does: it takes the first class of
// the driver. The source decides, unless a parameter contradicts.
func copiesOfAnyClass(p *plugin) {
	t := p.t
	for name, source := range map[string]*csi.CreateVolumeRequest{
		"filesystem": create(mounted("ext4"), paramLabel, "data"), "block": create(device()), "image": create(mounted("ext4"), paramPublishAs, "diskImage"),
	} {
		source.Name, source.CapacityRange = "source-"+name, &csi.CapacityRange{RequiredBytes: 64 * mib}
		v := p.mustCreate(source)
		snap, err := p.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "snap-" + name, SourceVolumeId: v.ID})
		if err != nil {
			t.Fatal(err)
		}
		id := snap.GetSnapshot().GetSnapshotId()
		copyAs := func(c *csi.VolumeCapability, params ...string) *csi.CreateVolumeRequest {
			r := create(c, params...)
			r.Name, r.VolumeContentSource = "copy-"+name, harness.FromSnapshot(id)
			return r
		}
		refused := [][]string{{paramPublishAs, "filesystem"}}
		if name == "filesystem" {
			refused = [][]string{{paramFormat, "btrfs"}, {paramLabel, "other"}, {paramFormatOptions, "nodesize=4096"}, {paramPublishAs, "diskImage"}}
		}
		for _, params := range refused {
			_, err := p.CreateVolume(t.Context(), copyAs(mounted("btrfs"), params...))
			t.Log(err)
			mustSay(t, err, codes.InvalidArgument, "snapshot "+id)
		}
		req := copyAs(mounted("btrfs"))
		c, again := p.mustCreate(req), p.mustCreate(req)
		if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil || again.ID != c.ID {
			t.Fatalf("a copy of %s: %v", name, err)
		}
		var st syscall.Statfs_t
		err = syscall.Statfs(c.Target, &st)
		_, noDisk := os.Stat(filepath.Join(c.Target, "disk.img"))
		if isExt4 := st.Type == 0xef53; err != nil || isExt4 != (name == "filesystem") || isExt4 != (noDisk != nil) {
			t.Errorf("a copy of %s: type %#x, disk.img: %v: %v", name, st.Type, noDisk, err)
		}
		if _, err := p.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
			t.Error(err)
		}
		if err := errors.Join(p.end(c), p.end(v)); err != nil {
			t.Error(err)
		}
	}
}

// validate asks what a claim can be used as.
func validate(p *plugin) {
	t := p.t
	c := p.mustCreate(create(mounted("ext4")))
	ask := func(caps ...*csi.VolumeCapability) *csi.ValidateVolumeCapabilitiesResponse {
		t.Helper()
		r, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: c.ID, VolumeCapabilities: caps})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ask(mounted("ext4"), mounted("")); len(r.GetConfirmed().GetVolumeCapabilities()) != 2 {
		t.Errorf("capabilities that it has: %v", r)
	}
	for name, cap := range map[string]*csi.VolumeCapability{"block": device(), "xfs": mounted("xfs")} {
		if r := ask(cap); r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), c.ID) {
			t.Errorf("%s: %v", name, r)
		}
	}
	for name, params := range map[string]map[string]string{
		"thick": {paramProvisioning: "thick"}, "xfs parameter": {paramFSType: "xfs"}, "disk image": {paramPublishAs: "diskImage"},
	} {
		r, err := p.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: c.ID, VolumeCapabilities: []*csi.VolumeCapability{mounted("")}, Parameters: params})
		if err != nil || r.GetConfirmed() != nil || r.GetMessage() == "" {
			t.Errorf("%s: %v %v", name, r, err)
		}
	}
	many := mounted("")
	many.AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	if r := ask(many); r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), "ReadWriteOncePod") {
		t.Errorf("many nodes: %v", r)
	}
	got, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.ID})
	if err != nil || got.GetVolume().GetCapacityBytes() != 256*mib || got.GetStatus() == nil {
		t.Errorf("get %v: %v", got, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
	_, err = p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.ID})
	mustSay(t, err, codes.NotFound, c.ID)
}

// refusedClaims makes calls that must fail, each with its code, and must leave the node as it was.
func refusedClaims(p *plugin) {
	t := p.t
	elsewhere := create(mounted(""))
	elsewhere.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "other"}}}}
	small := create(mounted("xfs"))
	small.CapacityRange = &csi.CapacityRange{RequiredBytes: mib, LimitBytes: 299 * mib}
	limited := create(mounted("xfs"))
	limited.CapacityRange = &csi.CapacityRange{LimitBytes: 100 * mib}
	source := create(mounted(""))
	source.VolumeContentSource = harness.FromSnapshot("none")
	away := proto.CloneOf(source)
	away.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{TopologyKey: "node-of-test"}}}}
	clone := proto.CloneOf(away)
	clone.VolumeContentSource = harness.FromVolume("pvc-elsewhere")
	for name, c := range map[string]struct {
		req  *csi.CreateVolumeRequest
		code codes.Code
		says []string
	}{
		"elsewhere":    {elsewhere, codes.ResourceExhausted, []string{TopologyKey, "node-of-test"}},
		"too small":    {small, codes.OutOfRange, []string{"limit_bytes", "xfs", "300Mi", "raise the limit"}},
		"limited":      {limited, codes.OutOfRange, []string{"limit_bytes", "104857600", "xfs"}},
		"parameter":    {create(mounted(""), "color", "red"), codes.InvalidArgument, []string{`"color"`}},
		"no source":    {source, codes.NotFound, []string{"snapshot", "none"}},
		"unknown name": {create(mounted("hfs")), codes.InvalidArgument, []string{`"hfs"`}},
		"not here": {away, codes.ResourceExhausted, []string{
			"snapshot none is not here, and a copy is made on the node of its source; put the pod there",
			"the label snapshot.storage.kubernetes.io/managed-by of its VolumeSnapshotContent names it"}},
		"clone": {clone, codes.ResourceExhausted, []string{
			"volume pvc-elsewhere is not here, and a copy is made on the node of its source; put the pod there",
			"nodeAffinity of its PersistentVolume names it"}},
	} {
		_, err := p.CreateVolume(t.Context(), c.req)
		t.Logf("%s: %v", name, err)
		mustSay(t, err, c.code, c.says...)
	}
	staging := filepath.Join(p.Kubelet, "plugins")
	if err := os.MkdirAll(staging, 0o750); err != nil {
		t.Fatal(err)
	}
	_, err := p.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: "unknown", StagingTargetPath: staging, VolumeCapability: mounted("")})
	mustSay(t, err, codes.NotFound, "unknown")
	_, err = p.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: "unknown", StagingTargetPath: staging, TargetPath: p.target("unknown"), VolumeCapability: mounted("")})
	mustSay(t, err, codes.NotFound, "unknown")
	_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: "unknown", CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
	mustSay(t, err, codes.NotFound, "unknown")

	// A claim that is used as something else, or deleted while it is in use.
	c := p.mustCreate(create(mounted("ext4")))
	wrong := *c.Volume
	wrong.Capability = device()
	mustSay(t, p.Stage(t.Context(), &wrong), codes.FailedPrecondition, "volumeMode")
	if err := p.stage(c); err != nil {
		t.Fatal(err)
	}
	_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: c.ID})
	t.Log(err)
	mustSay(t, err, codes.FailedPrecondition, "in use", "unstage")
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}

// snapshots takes, lists, restores and deletes a snapshot.
func snapshots(p *plugin) {
	t := p.t
	c := p.mustCreate(create(mounted("ext4")))
	if err := errors.Join(p.stage(c), p.publishClaim(c), os.WriteFile(filepath.Join(c.Target, "file"), []byte("kept"), 0o600)); err != nil {
		t.Fatal(err)
	}
	req := &csi.CreateSnapshotRequest{Name: "snapshot-1", SourceVolumeId: c.ID, Parameters: map[string]string{kubeletPrefix + "volumesnapshot/name": "s"}}
	r, err := p.CreateSnapshot(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	s := r.GetSnapshot()
	if !s.GetReadyToUse() || s.GetSizeBytes() != 256*mib || s.GetSourceVolumeId() != c.ID || time.Since(s.GetCreationTime().AsTime()) > time.Minute {
		t.Errorf("snapshot %v", s)
	}
	req.Parameters["speed"] = "high"
	_, err = p.CreateSnapshot(t.Context(), req)
	mustSay(t, err, codes.InvalidArgument, `"speed"`)
	for what, want := range map[*csi.ListSnapshotsRequest]int{
		{}: 1, {SnapshotId: s.SnapshotId}: 1, {SnapshotId: "none"}: 0, {SourceVolumeId: c.ID}: 1, {SourceVolumeId: "none"}: 0,
		{SnapshotId: s.SnapshotId, SourceVolumeId: "none"}: 0,
	} {
		if l, err := p.ListSnapshots(t.Context(), what); err != nil || len(l.GetEntries()) != want {
			t.Errorf("%v: %v %v", what, l, err)
		}
	}
	restore := create(mounted(""))
	restore.Name = "restored"
	restore.VolumeContentSource = harness.FromSnapshot(s.SnapshotId)
	restored := p.mustCreate(restore)
	if restored.created.GetContentSource().GetSnapshot().GetSnapshotId() != s.SnapshotId {
		t.Errorf("restored %v", restored.created)
	}
	if err := errors.Join(p.stage(restored), p.publishClaim(restored)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(restored.Target, "file")); string(b) != "kept" {
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

// expansion grows claims in use, and refuses to shrink them.
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
		r, err := p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.ID, CapacityRange: size, VolumeCapability: c.Capability})
		if err != nil || r.GetCapacityBytes() != 1<<30 || r.GetNodeExpansionRequired() != (name == "xfs") {
			t.Errorf("%s: %v: %v", name, r, err)
		}
		node, err := p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: c.ID, VolumePath: c.Target, StagingTargetPath: c.Staging, CapacityRange: size, VolumeCapability: c.Capability})
		if err != nil || node.GetCapacityBytes() != 1<<30 {
			t.Errorf("%s on the node: %v: %v", name, node, err)
		}
		_, err = p.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: c.ID, VolumePath: c.Target, VolumeCapability: device()})
		mustSay(t, err, codes.InvalidArgument, "Block")
		_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.ID, CapacityRange: size, VolumeCapability: device()})
		mustSay(t, err, codes.InvalidArgument, "Block")
		_, err = p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: c.ID, CapacityRange: &csi.CapacityRange{LimitBytes: 512 * mib}})
		t.Log(err)
		mustSay(t, err, codes.OutOfRange, "do not shrink")
		if err := p.end(c); err != nil {
			t.Error(err)
		}
	}
}

// health shuts a filesystem down and asks for conditions.
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
	testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", c.Target)
	r, err := p.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: c.ID, VolumePublishPath: c.Target, StagingTargetPath: c.Staging})
	if h := r.GetVolumeHealth().GetHealthStatuses(); err != nil || len(h) != 1 || h[0].GetStatus() != csi.VolumeHealthErrorType_INACCESSIBLE || h[0].GetReason() != "FilesystemShutDown" {
		t.Errorf("shut down: %v: %v", r, err)
	}
	if l := list(); len(l) != 1 || l[0].GetVolumeId() != c.ID {
		t.Errorf("shut down: %v", l)
	}
	if s, err := p.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{}); err != nil || len(s.GetBackendHealth()) > 0 {
		t.Errorf("the pool: %v: %v", s, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}
