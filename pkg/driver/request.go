// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// Keys of an inline volume's context. Those with this prefix are set by kubelet.
const (
	kubeletPrefix = "csi.storage.k8s.io/"
	keyEphemeral  = kubeletPrefix + "ephemeral"
	keyPodName    = kubeletPrefix + "pod.name"
	keyPodNS      = kubeletPrefix + "pod.namespace"
	keyPodUID     = kubeletPrefix + "pod.uid"
	keyTokens     = kubeletPrefix + "serviceAccount.tokens"
)

// Attributes that the author of a pod may write. Whoever may create a pod may
// write them: they are hostile until checked here.
const (
	attrSize      = "size"
	attrLabel     = "label"
	attrPublishAs = "publishAs"
)

var attributes = []string{attrLabel, attrPublishAs, attrSize}

// defaultFilesystem is used where the pod names none.
const defaultFilesystem = "ext4"

// publishRequest checks a NodePublishVolume request and turns it into what
// package volume understands. It looks at nothing but the request.
func publishRequest(req *csi.NodePublishVolumeRequest) (volume.Request, error) {
	var none volume.Request
	if err := volume.CheckID(req.GetVolumeId()); err != nil {
		return none, fmt.Errorf("volume_id: %w", err)
	}
	if req.GetTargetPath() == "" {
		return none, invalid("target_path: must not be empty")
	}
	capability := req.GetVolumeCapability()
	if capability == nil {
		return none, invalid("volume_capability: must not be empty")
	}
	ctx := req.GetVolumeContext()
	if ctx[keyEphemeral] != "true" {
		return none, invalid("volume_context: %s is %q: this driver publishes inline volumes (a pod's `volumes: - csi:`), for which kubelet sets it to \"true\"",
			keyEphemeral, ctx[keyEphemeral])
	}
	readOnly, err := accessMode(capability.GetAccessMode().GetMode())
	if err != nil {
		return none, err
	}
	if capability.GetMount() == nil {
		return none, invalid("volume_capability.access_type: must be mount: an inline volume is a filesystem")
	}
	if req.GetStagingTargetPath() != "" {
		return none, invalid("staging_target_path %q: must be empty: inline volumes are not staged", req.GetStagingTargetPath())
	}
	r := volume.Request{
		ID:       req.GetVolumeId(),
		Target:   strings.TrimRight(req.GetTargetPath(), "/"),
		ReadOnly: readOnly || req.GetReadonly(),
		Pod:      podOf(req),
	}
	if err := mountFlags(capability.GetMount().GetMountFlags(), &r); err != nil {
		return none, err
	}
	if r.Spec, err = inlineSpec(capability.GetMount().GetFsType(), ctx); err != nil {
		return none, err
	}
	r.Mode = volume.ModeFilesystem
	if v, ok := ctx[attrPublishAs]; ok {
		r.Mode = volume.Mode(v)
	}
	return r, r.Validate()
}

// podOf is who kubelet says a volume is for.
func podOf(req *csi.NodePublishVolumeRequest) volume.Pod {
	ctx := req.GetVolumeContext()
	return volume.Pod{Namespace: ctx[keyPodNS], Name: ctx[keyPodName], UID: ctx[keyPodUID]}
}

// inlineSpec reads what the volume shall contain.
func inlineSpec(fsType string, ctx map[string]string) (diskfs.Spec, error) {
	for _, key := range slices.Sorted(maps.Keys(ctx)) {
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.Contains(attributes, key) {
			return diskfs.Spec{}, invalid("volume attribute %q: unknown; allowed are %s", key, strings.Join(attributes, ", "))
		}
	}
	if fsType == "" {
		fsType = defaultFilesystem
	}
	fs, err := diskfs.Lookup(fsType)
	if err != nil || !fs.Formatted() {
		return diskfs.Spec{}, invalid("fsType %q: must be one of %s", fsType, strings.Join(diskfs.Names(), ", "))
	}
	spec := diskfs.Spec{Filesystem: fs.Name, Label: ctx[attrLabel], Size: fs.DefaultSize()}
	if v, ok := ctx[attrSize]; ok {
		if spec.Size, err = fs.ParseSize(v); err != nil {
			return diskfs.Spec{}, fmt.Errorf("volume attribute %s %q: %w", attrSize, v, err)
		}
	}
	if err := fs.CheckLabel(spec.Label); err != nil {
		return diskfs.Spec{}, fmt.Errorf("volume attribute %s: %w", attrLabel, err)
	}
	return spec, nil
}

// accessMode reports whether a mode is read-only, and refuses those that need
// more than one node.
func accessMode(mode csi.VolumeCapability_AccessMode_Mode) (readOnly bool, err error) {
	switch mode {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
		return false, nil
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		return true, nil
	}
	return false, invalid("volume_capability.access_mode %s: volumes live on one node; allowed are the SINGLE_NODE modes", mode)
}

// mountFlags reads the mount options that make sense for a volume of one pod.
func mountFlags(flags []string, r *volume.Request) error {
	for _, flag := range flags {
		switch flag {
		case "ro":
			r.ReadOnly = true
		case "noatime":
			r.NoATime = true
		case "rw", "nosuid", "nodev", "relatime": // the case already, or the default
		default:
			return invalid("volume_capability.mount.mount_flags: %q is not supported; allowed are ro, rw, noatime, relatime, nosuid, nodev", flag)
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{volume.ErrInvalid}, args...)...)
}
