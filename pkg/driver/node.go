// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

type nodeServer struct {
	csi.UnimplementedNodeServer
	cfg  Config
	busy inflight
}

func (s *nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	pod := podOf(req)
	note(ctx, "pod", pod.Namespace+"/"+pod.Name, "target", req.GetTargetPath())
	r, err := publishRequest(req)
	if err != nil {
		return nil, err
	}
	note(ctx, "filesystem", r.Spec.String(), "publishAs", r.Mode)
	done, err := s.busy.start(r.ID)
	if err != nil {
		return nil, err
	}
	defer done()
	res, err := s.cfg.Volumes.Publish(ctx, r)
	if res.Template != "" {
		note(ctx, "template", res.Template, "templateHit", res.TemplateHit)
		s.cfg.Metrics.template(res.TemplateHit)
	}
	if err != nil {
		return nil, err
	}
	if res.Existed {
		note(ctx, "existed", true)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

func (s *nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	note(ctx, "target", req.GetTargetPath())
	if err := volume.CheckID(req.GetVolumeId()); err != nil {
		return nil, fmt.Errorf("volume_id: %w", err)
	}
	if req.GetTargetPath() == "" {
		return nil, invalid("target_path: must not be empty")
	}
	done, err := s.busy.start(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer done()
	if err := s.cfg.Volumes.Unpublish(req.GetVolumeId(), strings.TrimRight(req.GetTargetPath(), "/")); err != nil {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (s *nodeServer) NodeGetVolumeStats(_ context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := volume.CheckID(req.GetVolumeId()); err != nil {
		return nil, fmt.Errorf("volume_id: %w", err)
	}
	if req.GetVolumePath() == "" {
		return nil, invalid("volume_path: must not be empty")
	}
	// What is measured is held open, and could not be unmounted meanwhile.
	done, err := s.busy.start(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer done()
	u, err := s.cfg.Volumes.Stats(req.GetVolumeId(), strings.TrimRight(req.GetVolumePath(), "/"))
	if errors.Is(err, volume.ErrInvalid) { // CSI 1.13: not at that path is NOT_FOUND, whatever the path
		err = fmt.Errorf("%w: %w", volume.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	usage := []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: u.TotalBytes, Used: u.UsedBytes, Available: u.AvailableBytes}}
	if u.TotalInodes > 0 { // btrfs has no fixed number of them
		usage = append(usage, &csi.VolumeUsage{Unit: csi.VolumeUsage_INODES, Total: u.TotalInodes, Used: u.UsedInodes, Available: u.AvailableInodes})
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: usage}, nil
}

func (s *nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	var caps []*csi.NodeServiceCapability
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		caps = append(caps, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             s.cfg.NodeID,
		AccessibleTopology: &csi.Topology{Segments: map[string]string{TopologyKey: s.cfg.NodeID}},
	}, nil
}

// inflight lets one operation at a time work on a volume. Operations on
// different volumes do not wait for each other.
type inflight struct {
	mu  sync.Mutex
	ids map[string]bool
}

// start claims a volume until done is called; errBusy if it is claimed.
func (i *inflight) start(id string) (done func(), err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ids[id] {
		return nil, fmt.Errorf("volume %s: %w", id, errBusy)
	}
	if i.ids == nil {
		i.ids = map[string]bool{}
	}
	i.ids[id] = true
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.ids, id)
	}, nil
}
