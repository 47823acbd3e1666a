// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// controllerServer makes volumes on the node that it runs on: one beside each
// external-provisioner with --node-deployment.
type controllerServer struct {
	csi.UnimplementedControllerServer
	cfg Config
}

func (s *controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	var caps []*csi.ControllerServiceCapability
	types := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	}
	for _, t := range types {
		caps = append(caps, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

func (s *controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	r, err := claimRequest(req)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.here(req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	id := r.ID()
	note(ctx, "volume", id, "content", r.Spec.String(), "mode", r.Mode, "source", r.Source.String())
	v, res, err := s.cfg.Volumes.CreateClaim(ctx, r)
	met(ctx, res)
	if code(err) == codes.NotFound && req.GetAccessibilityRequirements() != nil {
		// The scheduler chose this node without knowing where the source is. Only this
		// status code makes the provisioner ask the scheduler to choose again.
		return nil, fmt.Errorf("%w: dataSource: %s is not here, and a copy is made on the node of its source; put the pod there: %s names it",
			errElsewhere, r.Source, namesNode(r.Source))
	}
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeResponse{Volume: volumeOf(v, s.cfg.onlyHere())}, nil
}

func (s *controllerServer) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume_id: must not be empty")
	}
	if err := s.cfg.Volumes.DeleteClaim(req.GetVolumeId()); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (s *controllerServer) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	v, err := s.cfg.Volumes.GetClaim(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: volumeOf(v, s.cfg.onlyHere()), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

func (s *controllerServer) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume_id: must not be empty")
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("volume_capabilities: must not be empty")
	}
	v, err := s.cfg.Volumes.GetClaim(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	for _, c := range req.GetVolumeCapabilities() {
		u, err := useOf(c, image.Claim)
		if err == nil {
			err = volume.Supports(v, u)
		}
		if err != nil { // the call does not fail: this is its answer
			return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
		}
	}
	r, err := classRequest(req.GetVolumeCapabilities(), req.GetParameters())
	if err == nil && len(req.GetParameters()) > 0 {
		err = r.CompareClass(v)
	}
	if err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	if len(req.GetVolumeContext()) > 0 {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: "volume_context: volumes of this driver have none; leave it out"}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
	}}, nil
}

func (s *controllerServer) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	after, err := startingAfter(req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	claims, next, err := s.cfg.Volumes.ListClaims(after, int(req.GetMaxEntries()))
	if err != nil {
		return nil, err
	}
	r := &csi.ListVolumesResponse{NextToken: tokenAfter(next)}
	here, status := s.cfg.onlyHere(), &csi.ListVolumesResponse_VolumeStatus{} // the same for all
	for _, v := range claims {
		r.Entries = append(r.Entries, &csi.ListVolumesResponse_Entry{Volume: volumeOf(v, here), Status: status})
	}
	return r, nil
}

// GetCapacity returns the space that is left for volumes of a class. A class that
// CreateVolume will refuse has capacity, too. Without capacity the scheduler would hold back
// its pods, and the claim's events would never say what is wrong with the class.
func (s *controllerServer) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if t := req.GetAccessibleTopology(); t != nil && !s.cfg.isHere(t) {
		return &csi.GetCapacityResponse{MaximumVolumeSize: wrapperspb.Int64(0)}, nil
	}
	r, refused := classRequest(withMode(req.GetVolumeCapabilities()), req.GetParameters())
	available, err := s.cfg.Volumes.Available(r.Provisioning)
	if err != nil {
		return nil, err
	}
	if refused != nil {
		note(ctx, "refused", refused.Error())
		return &csi.GetCapacityResponse{AvailableCapacity: available}, nil
	}
	fs, err := diskfs.Lookup(cmp.Or(r.Spec.Filesystem, diskfs.Default))
	if err != nil {
		return nil, err
	}
	largest := min(available, fs.MaxSize)
	if largest < fs.MinSize {
		largest = 0
	}
	return &csi.GetCapacityResponse{
		AvailableCapacity: available,
		MaximumVolumeSize: wrapperspb.Int64(largest),
		// Smaller requests get this size.
		MinimumVolumeSize: wrapperspb.Int64(fs.MinSize),
	}, nil
}

func (s *controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetCapacityRange() == nil {
		return nil, invalid("capacity_range: must not be empty")
	}
	size, err := sizeOf(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	use, err := useIfGiven(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	now, mode, err := s.cfg.Volumes.Expand(req.GetVolumeId(), size, use)
	if s.cfg.SharedResizer && errors.Is(err, errdefs.ErrNotFound) {
		note(ctx, "leftToItsNode", true)
		return &csi.ControllerExpandVolumeResponse{CapacityBytes: size.Required, NodeExpansionRequired: true}, nil
	}
	if err != nil {
		return nil, err
	}
	note(ctx, "size", now)
	return &csi.ControllerExpandVolumeResponse{
		CapacityBytes: now,
		// A disk image has no device and no filesystem of the node that would have to follow.
		NodeExpansionRequired: mode != image.ModeDiskImage,
	}, nil
}

func (s *controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := checkName(req.GetName()); err != nil {
		return nil, err
	}
	if req.GetSourceVolumeId() == "" {
		return nil, invalid("source_volume_id: must not be empty")
	}
	for key := range req.GetParameters() {
		if !strings.HasPrefix(key, kubeletPrefix) {
			return nil, invalid("parameter %.64q: unknown; a snapshot has no parameters", key)
		}
	}
	if err := s.cfg.here(req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	id := volume.SnapshotID(req.GetName())
	note(ctx, "snapshot", id, "volume", req.GetSourceVolumeId())
	snap, err := s.cfg.Volumes.CreateSnapshot(ctx, req.GetName(), req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshotOf(snap, s.cfg.onlyHere())}, nil
}

func (s *controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	note(ctx, "snapshot", req.GetSnapshotId())
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot_id: must not be empty")
	}
	if err := s.cfg.Volumes.DeleteSnapshot(req.GetSnapshotId()); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

func (s *controllerServer) GetSnapshot(_ context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot_id: must not be empty")
	}
	snap, err := s.cfg.Volumes.GetSnapshot(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshotOf(snap, s.cfg.onlyHere())}, nil
}

func (s *controllerServer) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	after, err := startingAfter(req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	r := &csi.ListSnapshotsResponse{}
	snaps, next, err := s.snapshots(req, after)
	if err != nil {
		return nil, err
	}
	r.NextToken = tokenAfter(next)
	here := s.cfg.onlyHere() // the same for all
	for _, snap := range snaps {
		r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshotOf(snap, here)})
	}
	return r, nil
}

// snapshots finds the snapshots that a ListSnapshots request asks for. An unknown id gives
// an empty list, and no error.
func (s *controllerServer) snapshots(req *csi.ListSnapshotsRequest, after string) ([]image.SnapshotRecord, string, error) {
	id := req.GetSnapshotId()
	if id == "" {
		return s.cfg.Volumes.ListSnapshots(req.GetSourceVolumeId(), after, int(req.GetMaxEntries()))
	}
	snap, err := s.cfg.Volumes.GetSnapshot(id)
	if c := code(err); c == codes.NotFound || c == codes.InvalidArgument {
		return nil, "", nil
	}
	if err != nil || req.GetSourceVolumeId() != "" && snap.Volume != req.GetSourceVolumeId() {
		return nil, "", err
	}
	return []image.SnapshotRecord{snap}, "", nil
}

func (s *controllerServer) ControllerGetVolumeHealth(_ context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	h, err := healthOf(s.cfg.Volumes, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: h}, nil
}

// ControllerListVolumeHealth lists the volumes that have something wrong with them.
func (s *controllerServer) ControllerListVolumeHealth(_ context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	after, err := startingAfter(req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	found, next, err := s.cfg.Volumes.ListHealth(after, int(req.GetMaxEntries()))
	if err != nil {
		return nil, err
	}
	r := &csi.ControllerListVolumeHealthResponse{NextToken: tokenAfter(next)}
	for _, v := range found {
		r.Entries = append(r.Entries, conditionsOf(v.ID, v.Conditions))
	}
	return r, nil
}

// volumeOf describes a volume in CSI's form.
func volumeOf(v image.Record, here []*csi.Topology) *csi.Volume {
	out := &csi.Volume{
		VolumeId:           v.ID,
		CapacityBytes:      v.Spec.Size,
		AccessibleTopology: here,
	}
	switch {
	case v.Source.Snapshot != "":
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.Source.Snapshot},
		}}
	case v.Source.Volume != "":
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.Source.Volume},
		}}
	}
	return out
}

func snapshotOf(snap image.SnapshotRecord, here []*csi.Topology) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:         snap.ID,
		SourceVolumeId:     snap.Volume,
		SizeBytes:          snap.Spec.Size,
		CreationTime:       timestamppb.New(snap.Created),
		ReadyToUse:         true,
		AccessibleTopology: here,
	}
}

// topology is this node, where all that the plugin makes is accessible.
func (c Config) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{TopologyKey: c.NodeID}}
}

func (c Config) onlyHere() []*csi.Topology { return []*csi.Topology{c.topology()} }

func (c Config) isHere(t *csi.Topology) bool { return t.GetSegments()[TopologyKey] == c.NodeID }

// namesNode is where users read in Kubernetes on which node a source is.
func namesNode(s image.Source) string {
	if s.Snapshot != "" {
		return "the label snapshot.storage.kubernetes.io/managed-by of its VolumeSnapshotContent"
	}
	return "nodeAffinity of its PersistentVolume"
}

// here returns errElsewhere if the requirements cannot be met on this node.
func (c Config) here(r *csi.TopologyRequirement) error {
	wanted := r.GetRequisite()
	if len(wanted) == 0 {
		wanted = r.GetPreferred()
	}
	if len(wanted) == 0 || slices.ContainsFunc(wanted, c.isHere) {
		return nil
	}
	return fmt.Errorf("%w: accessibility_requirements: none of the %d topologies has %s=%s, and this plugin makes volumes only there", errElsewhere, len(wanted), TopologyKey, c.NodeID)
}

// tokenPrefix makes a token of an id. A token without it is rejected.
const tokenPrefix = "after:"

func tokenAfter(id string) string {
	if id == "" {
		return ""
	}
	return tokenPrefix + id
}

// startingAfter reads the token of a list: the id behind which the list goes on.
func startingAfter(token string, maxEntries int32) (id string, err error) {
	if maxEntries < 0 {
		return "", invalid("max_entries %d: must not be negative", maxEntries)
	}
	if token == "" {
		return "", nil
	}
	id, ok := strings.CutPrefix(token, tokenPrefix)
	if !ok || image.CheckID(id) != nil {
		return "", fmt.Errorf("%w: starting_token %.32q was not made by this plugin; start the list again without a token", errToken, token)
	}
	return id, nil
}
