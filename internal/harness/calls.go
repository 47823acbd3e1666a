// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// CallTimeout is how long kubelet waits for a call. It is also enough for a formatting VM on a busy machine.
const CallTimeout = 2 * time.Minute

// Client is a connection to the plugin of a node, as kubelet and the sidecars have it. It outlives the plugin's process
// and connects again to the next. The calls that take a [Volume] end after [CallTimeout].
type Client struct {
	csi.NodeClient
	csi.ControllerClient
	csi.IdentityClient
	Conn *grpc.ClientConn
}

// Connect makes a connection, which waits for the plugin if there is none. Who makes it closes Conn.
func (n Node) Connect() (*Client, error) { return Connect(n.Endpoint()) }

// Connect is [Node.Connect] to any driver, by its endpoint as gRPC has it: unix:///csi/csi.sock.
func Connect(endpoint string) (*Client, error) {
	// Plugins come and go: gRPC's usual second between two attempts would be most of a test's time.
	again := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: time.Second}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(again))
	if err != nil {
		return nil, err
	}
	return &Client{csi.NewNodeClient(conn), csi.NewControllerClient(conn), csi.NewIdentityClient(conn), conn}, nil
}

// Mounted is the capability of a mounted volume, as Kubernetes sends it for ReadWriteOnce.
func Mounted(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
	}
}

// Block is the capability of a block volume.
func Block() *csi.VolumeCapability {
	c := Mounted("")
	c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	return c
}

// FromSnapshot is the source of a claim that is made of a snapshot.
func FromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

// FromVolume is the source of a claim that is a clone.
func FromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// Pod is the pod that an inline volume is for.
type Pod struct{ Namespace, Name, UID string }

// InlineContext is what kubelet sends with an inline volume: the volume's attributes, and its pod (podInfoOnMount).
func InlineContext(pod Pod, attributes map[string]string) map[string]string {
	all := map[string]string{
		"csi.storage.k8s.io/ephemeral":           "true",
		"csi.storage.k8s.io/pod.name":            pod.Name,
		"csi.storage.k8s.io/pod.namespace":       pod.Namespace,
		"csi.storage.k8s.io/pod.uid":             pod.UID,
		"csi.storage.k8s.io/serviceAccount.name": "default",
	}
	maps.Copy(all, attributes)
	return all
}

// Volume is a volume as kubelet knows it: an inline one, or a claim.
type Volume struct {
	ID         string
	Capability *csi.VolumeCapability
	Context    map[string]string // of an inline volume: InlineContext
	Staging    string            // empty for an inline volume, which is not staged
	Target     string
}

// Inline is an inline volume of a pod.
func (n Node) Inline(id, fsType string, pod Pod, attributes map[string]string) *Volume {
	return &Volume{ID: id, Capability: Mounted(fsType), Context: InlineContext(pod, attributes), Target: n.Target(pod.UID, "scratch")}
}

// Claim is a claim that a pod uses.
func (n Node) Claim(id string, c *csi.VolumeCapability, uid string) *Volume {
	return &Volume{ID: id, Capability: c, Staging: n.Staging(id), Target: n.Target(uid, id)}
}

// MakeDirs makes the directories that kubelet makes before it calls: the staging path, and the parent of the target.
func (v *Volume) MakeDirs() error {
	if v.Staging != "" {
		if err := os.MkdirAll(v.Staging, 0o750); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Dir(v.Target), 0o750)
}

// CreateRequest is what a provisioner sends for a claim.
func CreateRequest(name string, bytes int64, c *csi.VolumeCapability, parameters map[string]string) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: name, Parameters: parameters,
		VolumeCapabilities: []*csi.VolumeCapability{c},
		CapacityRange:      &csi.CapacityRange{RequiredBytes: bytes},
	}
}

// PublishRequest is what kubelet sends to publish a volume.
func (v *Volume) PublishRequest() *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: v.ID, StagingTargetPath: v.Staging, TargetPath: v.Target, VolumeCapability: v.Capability, VolumeContext: v.Context,
	}
}

// Create creates a claim.
func (c *Client) Create(ctx context.Context, r *csi.CreateVolumeRequest) (*csi.Volume, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	answer, err := c.CreateVolume(ctx, r)
	return answer.GetVolume(), err
}

// Stage stages a claim.
func (c *Client) Stage(ctx context.Context, v *Volume) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.ID, StagingTargetPath: v.Staging, VolumeCapability: v.Capability, VolumeContext: v.Context,
	})
	return err
}

// Publish publishes a volume to its pod.
func (c *Client) Publish(ctx context.Context, v *Volume) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.NodePublishVolume(ctx, v.PublishRequest())
	return err
}

// MayTryAgain reports whether the same call may succeed later, as that of a volume whose template is being built.
// Kubelet tries again, whatever the error.
func MayTryAgain(err error) bool {
	return slices.Contains([]codes.Code{codes.Aborted, codes.DeadlineExceeded, codes.Unavailable}, status.Code(err))
}

// Unpublish takes a volume from its pod. An inline volume is deleted with that.
func (c *Client) Unpublish(ctx context.Context, v *Volume) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.ID, TargetPath: v.Target})
	return err
}

// Unstage takes a claim from the node.
func (c *Client) Unstage(ctx context.Context, v *Volume) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.Staging})
	return err
}

// Delete deletes a claim.
func (c *Client) Delete(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

// Expand grows a claim to so many bytes. [Client.ExpandOnNode] then grows its filesystem.
func (c *Client) Expand(ctx context.Context, id string, bytes int64) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}})
	return err
}

// ExpandOnNode grows the filesystem of a claim that is published.
func (c *Client) ExpandOnNode(ctx context.Context, v *Volume, bytes int64) error {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	_, err := c.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.ID, VolumePath: v.Target, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}})
	return err
}

// Snapshot takes a snapshot of a claim.
func (c *Client) Snapshot(ctx context.Context, name, volume string) (*csi.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	answer, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	return answer.GetSnapshot(), err
}
