// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

type nodeServer struct {
	csi.UnimplementedNodeServer
	cfg Config
}

func (s *nodeServer) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	note(ctx, "staging", req.GetStagingTargetPath())
	r, err := stageRequest(req)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Volumes.Stage(ctx, r); err != nil {
		return nil, missing(err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (s *nodeServer) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	note(ctx, "staging", req.GetStagingTargetPath())
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetStagingTargetPath() == "" {
		return nil, invalid("staging_target_path: must not be empty")
	}
	if err := s.cfg.Volumes.Unstage(req.GetVolumeId(), trimmed(req.GetStagingTargetPath())); err != nil {
		return nil, err
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func (s *nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	pod := podOf(req)
	note(ctx, "pod", pod.Namespace+"/"+pod.Name, "target", req.GetTargetPath())
	publish := s.publishClaim
	if isInline(req) {
		publish = s.publishInline
	}
	if err := publish(ctx, req); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

func (s *nodeServer) publishInline(ctx context.Context, req *csi.NodePublishVolumeRequest) error {
	r, err := inlineRequest(req)
	if err != nil {
		return err
	}
	note(ctx, "filesystem", r.Spec.String(), "publishAs", r.Mode)
	res, err := s.cfg.Volumes.PublishInline(ctx, r)
	met(ctx, res)
	return err
}

func (s *nodeServer) publishClaim(ctx context.Context, req *csi.NodePublishVolumeRequest) error {
	r, err := publishRequest(req)
	if err != nil {
		return err
	}
	return missing(s.cfg.Volumes.PublishClaim(ctx, r))
}

// missing tells what to do about a claim that a pod waits for and that is not here.
func missing(err error) error {
	if code(err) == codes.NotFound {
		err = fmt.Errorf("%w; a claim is on the node that made it, unless it was deleted: compare its PersistentVolume", err)
	}
	return err
}

func (s *nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	note(ctx, "target", req.GetTargetPath())
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetTargetPath() == "" {
		return nil, invalid("target_path: must not be empty")
	}
	if err := s.cfg.Volumes.Unpublish(req.GetVolumeId(), trimmed(req.GetTargetPath())); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (s *nodeServer) NodeGetVolumeStats(_ context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, invalid("volume_path: must not be empty")
	}
	u, err := s.cfg.Volumes.Stats(req.GetVolumeId(), trimmed(req.GetVolumePath()))
	if err != nil {
		return nil, err
	}
	usage := []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: u.TotalBytes, Used: u.UsedBytes, Available: u.AvailableBytes}}
	if u.TotalInodes > 0 { // btrfs has no fixed number of them
		usage = append(usage, &csi.VolumeUsage{Unit: csi.VolumeUsage_INODES, Total: u.TotalInodes, Used: u.UsedInodes, Available: u.AvailableInodes})
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, nil
}

func (s *nodeServer) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	note(ctx, "path", req.GetVolumePath())
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetVolumePath() == "" {
		return nil, invalid("volume_path: must not be empty")
	}
	size, err := sizeOf(req.GetCapacityRange())
	if err != nil {
		return nil, err
	}
	use, err := useIfGiven(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	now, err := s.cfg.Volumes.ExpandOnNode(req.GetVolumeId(), trimmed(req.GetVolumePath()), size, use)
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: now}, nil
}

func (s *nodeServer) NodeGetVolumeHealth(_ context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return nil, err
	}
	var paths []string
	for _, path := range []string{req.GetVolumePublishPath(), req.GetStagingTargetPath()} {
		if path != "" {
			paths = append(paths, trimmed(path))
		}
	}
	h, err := healthOf(s.cfg.Volumes, req.GetVolumeId(), paths...)
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
}

func (s *nodeServer) NodeGetStorageHealth(context.Context, *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	r := &csi.NodeGetStorageHealthResponse{}
	for _, c := range s.cfg.Volumes.PoolHealth() {
		status := csi.StorageHealthErrorType_STORAGE_DEGRADED
		if c.Severity > health.Degraded {
			status = csi.StorageHealthErrorType_STORAGE_UNREACHABLE
		}
		r.BackendHealth = append(r.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{Status: status, Reason: c.Code, Message: c.Message()})
	}
	return r, nil
}

// healthOf returns a volume's health in CSI's form, for both the node and the controller
// service: they are on the same node, and see the same.
func healthOf(volumes *volume.Manager, id string, paths ...string) (*csi.VolumeHealth, error) {
	conditions, err := volumes.Health(id, paths...)
	if err != nil {
		return nil, err
	}
	return conditionsOf(id, conditions), nil
}

func conditionsOf(id string, conditions []health.Condition) *csi.VolumeHealth {
	h := &csi.VolumeHealth{VolumeId: id}
	for _, c := range conditions {
		status := map[health.Severity]csi.VolumeHealthErrorType{
			health.Degraded:     csi.VolumeHealthErrorType_DEGRADED,
			health.Inaccessible: csi.VolumeHealthErrorType_INACCESSIBLE,
			health.DataLoss:     csi.VolumeHealthErrorType_DATA_LOSS,
		}[c.Severity]
		h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{Status: status, Reason: c.Code, Message: c.Message()})
	}
	return h
}

func (s *nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	var caps []*csi.NodeServiceCapability
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		caps = append(caps, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.cfg.NodeID,
		MaxVolumesPerNode:  s.cfg.MaxVolumes,
		AccessibleTopology: s.cfg.topology(),
	}, nil
}
