// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"cmp"
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

// publishRequest checks a NodePublishVolume request for an inline volume and turns
// it into what package volume understands. It looks at nothing but the request.
func publishRequest(req *csi.NodePublishVolumeRequest) (volume.Request, error) {
	var none volume.Request
	if err := targetOf(req); err != nil {
		return none, err
	}
	u, err := useOf(req.GetVolumeCapability(), inlineFlags)
	if err != nil {
		return none, err
	}
	if u.Block {
		return none, invalid("volume_capability.access_type: must be mount: an inline volume is a filesystem")
	}
	if req.GetStagingTargetPath() != "" {
		return none, invalid("staging_target_path %q: must be empty: inline volumes are not staged", req.GetStagingTargetPath())
	}
	r := volume.Request{
		ID:     req.GetVolumeId(),
		Target: trimmed(req.GetTargetPath()),
		Access: u.Access,
		Pod:    podOf(req),
	}
	r.ReadOnly = r.ReadOnly || req.GetReadonly()
	if r.Spec, err = inlineSpec(u.Filesystem, req.GetVolumeContext()); err != nil {
		return none, err
	}
	r.Mode = volume.ModeFilesystem
	if v, ok := req.GetVolumeContext()[attrPublishAs]; ok {
		if r.Mode = volume.Mode(v); !slices.Contains(volume.MountModes, r.Mode) {
			return none, invalid("volume attribute %s %.64q: must be one of %v", attrPublishAs, v, volume.MountModes)
		}
	}
	return r, r.Validate()
}

// targetOf checks what every NodePublishVolume request has.
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
	if err := volume.CheckID(id); err != nil {
		return fmt.Errorf("volume_id: %w", err)
	}
	return nil
}

// trimmed is a path without a slash at its end.
func trimmed(path string) string { return strings.TrimRight(path, "/") }

// isInline reports whether a volume is to be made by this call, and gone with its
// pod. Kubelet says so, and lets no pod say it instead.
func isInline(req *csi.NodePublishVolumeRequest) bool {
	return req.GetVolumeContext()[keyEphemeral] == "true"
}

// stageRequest checks a NodeStageVolume request, likewise.
func stageRequest(req *csi.NodeStageVolumeRequest) (volume.StageRequest, error) {
	r := volume.StageRequest{ID: req.GetVolumeId(), Staging: trimmed(req.GetStagingTargetPath())}
	if err := checkVolumeID(r.ID); err != nil {
		return r, err
	}
	if r.Staging == "" {
		return r, invalid("staging_target_path: must not be empty")
	}
	var err error
	r.Use, err = useOf(req.GetVolumeCapability(), claimFlags)
	return r, err
}

// publishClaimRequest checks a NodePublishVolume request for a claim, likewise.
func publishClaimRequest(req *csi.NodePublishVolumeRequest) (volume.PublishRequest, error) {
	r := volume.PublishRequest{
		ID: req.GetVolumeId(), Staging: trimmed(req.GetStagingTargetPath()), Target: trimmed(req.GetTargetPath()), TargetReadOnly: req.GetReadonly(),
	}
	if err := targetOf(req); err != nil {
		return r, err
	}
	var err error
	if r.Use, err = useOf(req.GetVolumeCapability(), claimFlags); err != nil {
		return r, err
	}
	if r.Staging == "" { // CSI 1.13, NodePublishVolume errors
		return r, fmt.Errorf("%w: staging_target_path: must not be empty for a volume that is no inline volume (its volume_context has no %s=true; is podInfoOnMount set in CSIDriver?)", volume.ErrState, keyEphemeral)
	}
	return r, nil
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
			return diskfs.Spec{}, invalid("volume attribute %.64q: unknown; allowed are %s", key, strings.Join(attributes, ", "))
		}
	}
	fs, err := filesystemNamed("fsType", cmp.Or(fsType, defaultFilesystem))
	if err != nil {
		return diskfs.Spec{}, err
	}
	spec := diskfs.Spec{Filesystem: fs.Name, Label: ctx[attrLabel], Size: fs.DefaultSize()}
	if v, ok := ctx[attrSize]; ok {
		if spec.Size, err = fs.ParseSize(v); err != nil {
			return diskfs.Spec{}, fmt.Errorf("volume attribute %s %.32q: %w", attrSize, v, err)
		}
	}
	if err := fs.CheckLabel(spec.Label); err != nil {
		return diskfs.Spec{}, fmt.Errorf("volume attribute %s: %w", attrLabel, err)
	}
	return spec, nil
}

// filesystemNamed finds a filesystem that can be asked for.
func filesystemNamed(field, name string) (*diskfs.Filesystem, error) {
	fs, err := diskfs.Lookup(name)
	if err != nil || !fs.Formatted() {
		return nil, invalid("%s %.64q: must be one of %s", field, name, strings.Join(diskfs.Names(), ", "))
	}
	return fs, nil
}

// Mount flags: whoever may create a pod gives those of its inline volumes, an
// administrator those of a StorageClass.
var (
	inlineFlags = []string{"ro", "rw", "noatime", "relatime", "nosuid", "nodev"}
	claimFlags  = append([]string{"suid", "dev", "exec", "noexec"}, inlineFlags...)
)

// useOf reads a volume capability, of which flags are allowed.
func useOf(c *csi.VolumeCapability, flags []string) (volume.Use, error) {
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
		return u, invalid("volume_capability.access_mode %s: volumes live on one node; allowed are the SINGLE_NODE modes", mode)
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
	return u, mountFlags(c.GetMount().GetMountFlags(), flags, &u.Access)
}

// useIfGiven reads a capability that may be left out; then it is nil.
func useIfGiven(c *csi.VolumeCapability) (*volume.Use, error) {
	if c == nil {
		return nil, nil
	}
	u, err := useOf(c, claimFlags)
	return &u, err
}

// mountFlags reads mount options as mount(8) has them.
func mountFlags(given, allowed []string, a *volume.Access) error {
	for _, flag := range given {
		if !slices.Contains(allowed, flag) {
			return invalid("volume_capability.mount.mount_flags: %.64q is not supported; allowed are %s", flag, strings.Join(allowed, ", "))
		}
		switch flag { // of two that contradict each other the last counts, as with mount(8)
		case "ro", "rw":
			a.ReadOnly = flag == "ro"
		case "noatime", "relatime":
			a.NoATime = flag == "noatime"
		case "noexec", "exec":
			a.NoExec = flag == "noexec"
		case "suid", "nosuid":
			a.SUID = flag == "suid"
		case "dev", "nodev":
			a.Dev = flag == "dev"
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{volume.ErrInvalid}, args...)...)
}
