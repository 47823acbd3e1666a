// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Keys of an inline volume's context. Kubelet sets those with this prefix.
const (
	kubeletPrefix = "csi.storage.k8s.io/"
	keyEphemeral  = kubeletPrefix + "ephemeral"
	keyPodName    = kubeletPrefix + "pod.name"
	keyPodNS      = kubeletPrefix + "pod.namespace"
	keyPodUID     = kubeletPrefix + "pod.uid"
	keyTokens     = kubeletPrefix + "serviceAccount.tokens"
)

// inlineRequest checks a NodePublishVolume request for an inline volume, and makes the
// request of package volume from it. It looks at nothing but the request.
func inlineRequest(req *csi.NodePublishVolumeRequest) (volume.InlineRequest, error) {
	var none volume.InlineRequest
	if err := targetOf(req); err != nil {
		return none, err
	}
	u, err := useOf(req.GetVolumeCapability(), image.Inline)
	if err != nil {
		return none, err
	}
	if u.Block {
		return none, invalid("volume_capability.access_type: must be mount: an inline volume is a filesystem")
	}
	if req.GetStagingTargetPath() != "" {
		return none, invalid("staging_target_path %q: must be empty: inline volumes are not staged", req.GetStagingTargetPath())
	}
	r := volume.InlineRequest{
		ID:     req.GetVolumeId(),
		Target: trimmed(req.GetTargetPath()),
		Access: u.Access,
		Pod:    podOf(req),
		Mode:   image.ModeFilesystem,
	}
	r.ReadOnly = r.ReadOnly || req.GetReadonly()
	if err := readAttributes(&r, u.Filesystem, req.GetVolumeContext()); err != nil {
		return none, err
	}
	return r, r.Validate()
}

// givenText reads a value that must not be empty. field names it in the error.
func givenText[T ~string](into *T, field, value string) error {
	if *into = T(value); value == "" {
		return invalid("%s: must not be empty; leave it out", field)
	}
	return nil
}

// mountMode reads the value of publishAs, an attribute or a parameter. field names it in the
// error.
func mountMode(field, value string) (image.Mode, error) {
	mode := image.Mode(value)
	if !slices.Contains(image.MountModes, mode) {
		return "", invalid("%s %.64q: must be one of %s", field, value, volume.ModeList(image.MountModes))
	}
	return mode, nil
}

// targetOf checks the fields that every NodePublishVolume request must have.
func targetOf(req *csi.NodePublishVolumeRequest) error {
	if err := checkVolumeID(req.GetVolumeId()); err != nil {
		return err
	}
	if req.GetTargetPath() == "" {
		return invalid("target_path: must not be empty")
	}
	return nil
}

func checkVolumeID(id string) error {
	if err := image.CheckID(id); err != nil {
		return fmt.Errorf("volume_id: %w", err)
	}
	return nil
}

// trimmed is a path without a slash at its end.
func trimmed(path string) string { return strings.TrimRight(path, "/") }

// isInline reports whether a request is for an inline volume. Kubelet sets this key, and a
// pod cannot.
func isInline(req *csi.NodePublishVolumeRequest) bool {
	return req.GetVolumeContext()[keyEphemeral] == "true"
}

// stageRequest checks a NodeStageVolume request.
func stageRequest(req *csi.NodeStageVolumeRequest) (volume.StageRequest, error) {
	r := volume.StageRequest{ID: req.GetVolumeId(), Staging: trimmed(req.GetStagingTargetPath())}
	if err := checkVolumeID(r.ID); err != nil {
		return r, err
	}
	if r.Staging == "" {
		return r, invalid("staging_target_path: must not be empty")
	}
	var err error
	r.Use, err = useOf(req.GetVolumeCapability(), image.Claim)
	return r, err
}

// publishRequest checks a NodePublishVolume request for a claim.
func publishRequest(req *csi.NodePublishVolumeRequest) (volume.PublishRequest, error) {
	r := volume.PublishRequest{
		ID: req.GetVolumeId(), Staging: trimmed(req.GetStagingTargetPath()), Target: trimmed(req.GetTargetPath()), TargetReadOnly: req.GetReadonly(),
	}
	if err := targetOf(req); err != nil {
		return r, err
	}
	var err error
	if r.Use, err = useOf(req.GetVolumeCapability(), image.Claim); err != nil {
		return r, err
	}
	if r.Staging == "" { // CSI 1.13, NodePublishVolume errors
		return r, fmt.Errorf("%w: staging_target_path: must not be empty for a claim (this volume's volume_context has no %s=true; is podInfoOnMount set in CSIDriver?)", errdefs.ErrState, keyEphemeral)
	}
	return r, nil
}

// podOf is the pod that a volume is for, as kubelet names it.
func podOf(req *csi.NodePublishVolumeRequest) image.Pod {
	ctx := req.GetVolumeContext()
	return image.Pod{Namespace: ctx[keyPodNS], Name: ctx[keyPodName], UID: ctx[keyPodUID]}
}

// contentNamed reads the name of a content. field names it in the error.
func contentNamed(field, name string) (string, error) {
	if name == "" {
		return "", invalid("%s: must not be empty; leave it out for an empty volume", field)
	}
	if err := diskfs.CheckContent(name); err != nil {
		return "", fmt.Errorf("%s: %w", field, err)
	}
	return name, nil
}

// filesystemNamed finds a filesystem that users may ask for. field names it in the error.
func filesystemNamed(field, name string) (*diskfs.Filesystem, error) {
	fs, err := diskfs.Lookup(name)
	if err != nil || !fs.Formatted() {
		return nil, invalid("%s %.64q: must be one of %s", field, name, strings.Join(diskfs.Names(), ", "))
	}
	return fs, nil
}

// useOf reads the volume capability of an inline volume or a claim.
func useOf(c *csi.VolumeCapability, of image.Lifecycle) (volume.Use, error) {
	var u volume.Use
	if c == nil {
		return u, invalid("volume_capability: must not be empty")
	}
	switch mode := c.GetAccessMode().GetMode(); mode {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER:
		u.SingleTarget = true
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		u.SingleTarget, u.ReadOnly = true, true
	default:
		return u, invalid("accessModes: %s is of several nodes, and a volume lives on one; ask for ReadWriteOnce or ReadWriteOncePod", accessMode(mode))
	}
	switch c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		u.Block = true
		return u, nil
	case *csi.VolumeCapability_Mount:
	default:
		return u, invalid("volume_capability.access_type: must be block or mount")
	}
	if u.Filesystem = c.GetMount().GetFsType(); u.Filesystem != "" {
		if _, err := filesystemNamed("fsType", u.Filesystem); err != nil {
			return u, err
		}
	}
	access, err := image.ParseMountFlags(c.GetMount().GetMountFlags(), of)
	access.ReadOnly = access.ReadOnly || u.ReadOnly
	u.Access = access
	return u, err
}

// accessMode is an access mode as claims have it, with CSI's name.
func accessMode(mode csi.VolumeCapability_AccessMode_Mode) string {
	switch mode {
	case csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return "ReadOnlyMany (" + mode.String() + ")"
	case csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
		return "ReadWriteMany (" + mode.String() + ")"
	}
	return mode.String()
}

// useIfGiven reads a capability. It returns nil if the capability was left out.
func useIfGiven(c *csi.VolumeCapability) (*volume.Use, error) {
	if c == nil {
		return nil, nil
	}
	u, err := useOf(c, image.Claim)
	return &u, err
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errdefs.ErrInvalid}, args...)...)
}
