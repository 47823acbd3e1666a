// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
)

// Parameters of a StorageClass.
const (
	paramFormat        = "format"
	paramFormatOptions = "formatOptions"
	paramLabel         = "label"
	paramProvisioning  = "provisioning"
	paramPublishAs     = "publishAs"
	paramFSType        = kubeletPrefix + "fstype"

	formatNone = "none"
)

var (
	parameters    = []string{paramFormat, paramFormatOptions, paramLabel, paramProvisioning, paramPublishAs}
	provisionings = []string{"thin", "thick"}
)

// maxName is the limit of CSI for a name ("Size Limits"), in bytes.
const maxName = 128

// checkName holds a name that a container orchestrator suggests against the
// specification (CreateVolumeRequest.name).
func checkName(name string) error {
	switch {
	case name == "":
		return invalid("name: must not be empty")
	case len(name) > maxName:
		return invalid("name %.32q…: has %d bytes, at most %d are allowed", name, len(name), maxName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool {
		return r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0x7f && r <= 0x9f
	}):
		return invalid("name %q: must be UTF-8 without control characters", name)
	}
	return nil
}

// claimRequest checks a CreateVolume request and turns it into what package volume
// understands. It looks at nothing but the request.
func claimRequest(req *csi.CreateVolumeRequest) (volume.ClaimRequest, error) {
	if err := checkName(req.GetName()); err != nil {
		return volume.ClaimRequest{}, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return volume.ClaimRequest{}, invalid("volume_capabilities: must not be empty")
	}
	if len(req.GetMutableParameters()) > 0 {
		return volume.ClaimRequest{}, invalid("mutable_parameters: this driver has none (no VolumeAttributesClass); leave them out")
	}
	r, err := classRequest(req.GetVolumeCapabilities(), req.GetParameters())
	if err != nil {
		return r, err
	}
	r.Name = req.GetName()
	size, err := sizeOf(req.GetCapacityRange())
	if err != nil {
		return r, err
	}
	r.Spec.Size, r.Limit = diskfs.RoundUp(size.Required), size.Limit
	r.Source, err = sourceOf(req.GetVolumeContentSource())
	return r, err
}

// classRequest reads what capabilities and parameters say of a volume: all but its
// name, size and source. No capabilities stand for those that go with the parameters.
func classRequest(capabilities []*csi.VolumeCapability, params map[string]string) (volume.ClaimRequest, error) {
	var r volume.ClaimRequest
	for _, key := range slices.Sorted(maps.Keys(params)) {
		// The provisioner's own, as with --extra-create-metadata.
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.Contains(parameters, key) {
			return r, invalid("parameter %.64q: unknown; allowed are %s, and %s", key, strings.Join(parameters, ", "), paramFSType)
		}
	}
	u, err := useOfAll(capabilities)
	if err != nil {
		return r, err
	}
	if len(capabilities) == 0 { // as the provisioner asks for capacity: only disks have a format
		u.Block = params[paramFormat] != "" && params[paramPublishAs] == ""
	}
	// The provisioner makes it part of the capability; a caller of its own may not.
	if v, ok := params[paramFSType]; ok && !u.Block {
		fs, err := filesystemNamed("parameter "+paramFSType, v)
		if err != nil {
			return r, err
		}
		if u.Filesystem != "" && u.Filesystem != fs.Name {
			return r, invalid("parameter %s %.64q: the volume capability asks for %q; give one of them", paramFSType, v, u.Filesystem)
		}
		u.Filesystem = fs.Name
	}
	if r.Mode, err = modeOf(u.Block, params); err != nil {
		return r, err
	}
	provisioning := cmp.Or(params[paramProvisioning], provisionings[0])
	if !slices.Contains(provisionings, provisioning) {
		return r, invalid("parameter %s %.64q: must be one of %s", paramProvisioning, provisioning, strings.Join(provisionings, ", "))
	}
	r.Thick = provisioning == "thick"
	r.Spec, err = specOf(r.Mode, u.Filesystem, params)
	r.DefaultSpec = u.Filesystem == "" && params[paramFormat] == "" && params[paramLabel] == "" && params[paramFormatOptions] == ""
	return r, err
}

// withMode leaves out capabilities without an access mode. Provisioners before those
// that ask for capacity without any send such in place of what they do not know.
func withMode(capabilities []*csi.VolumeCapability) []*csi.VolumeCapability {
	return slices.DeleteFunc(slices.Clone(capabilities), func(c *csi.VolumeCapability) bool {
		return c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_UNKNOWN
	})
}

// useOfAll reads several capabilities, all of which the volume must have, and
// returns what they say of the volume.
func useOfAll(capabilities []*csi.VolumeCapability) (volume.Use, error) {
	var all volume.Use
	for i, c := range capabilities {
		u, err := useOf(c, claimFlags)
		if err != nil {
			return u, err
		}
		if i > 0 && u.Block != all.Block {
			return u, invalid("volume_capabilities: have both block and mount: a volume is one or the other")
		}
		if all.Filesystem != "" && u.Filesystem != "" && u.Filesystem != all.Filesystem {
			return u, invalid("volume_capabilities: have the filesystems %q and %q: a volume has one", all.Filesystem, u.Filesystem)
		}
		all.Block, all.Filesystem = u.Block, cmp.Or(all.Filesystem, u.Filesystem)
	}
	return all, nil
}

// modeOf decides how a volume is published.
func modeOf(block bool, params map[string]string) (volume.Mode, error) {
	publishAs, given := params[paramPublishAs]
	switch {
	case block && given:
		return "", invalid("parameter %s %.64q: does not go with volumeMode Block, which is published as a device; use another StorageClass", paramPublishAs, publishAs)
	case block:
		return volume.ModeBlock, nil
	case !given:
		return volume.ModeFilesystem, nil
	}
	mode := volume.Mode(publishAs)
	if !slices.Contains(volume.MountModes, mode) {
		return "", invalid("parameter %s %.64q: must be one of %v", paramPublishAs, publishAs, volume.MountModes)
	}
	return mode, nil
}

// specOf decides what is inside a volume. fsType is for what gets mounted; a disk
// may say for itself what it is formatted with, or that it is not.
func specOf(mode volume.Mode, fsType string, params map[string]string) (diskfs.Spec, error) {
	var spec diskfs.Spec
	format, given := params[paramFormat]
	if mode == volume.ModeFilesystem && given {
		return spec, invalid("parameter %s %.64q: is for disks (volumeMode Block, or %s: %s); the filesystem of a mounted volume is fsType", paramFormat, format, paramPublishAs, volume.ModeDiskImage)
	}
	if mode == volume.ModeBlock && !given {
		format = formatNone
	}
	if format == formatNone {
		for _, p := range []string{paramLabel, paramFormatOptions} {
			if params[p] != "" {
				return spec, invalid("parameter %s %.64q: there is nothing to format; add %s: one of %s", p, params[p], paramFormat, strings.Join(diskfs.Names(), ", "))
			}
		}
		return diskfs.Spec{Filesystem: "raw"}, nil
	}
	field, name := "fsType", cmp.Or(fsType, defaultFilesystem)
	if given {
		field, name = "parameter "+paramFormat, format
	}
	fs, err := diskfs.Lookup(name)
	if err != nil || !fs.Formatted() {
		allowed := diskfs.Names()
		if given {
			allowed = append([]string{formatNone}, allowed...)
		}
		return spec, invalid("%s %.64q: must be one of %s", field, name, strings.Join(allowed, ", "))
	}
	spec = diskfs.Spec{Filesystem: fs.Name, Label: params[paramLabel]}
	if spec.Options, err = formatOptions(params[paramFormatOptions]); err != nil {
		return spec, err
	}
	if err := fs.CheckLabel(spec.Label); err != nil {
		return spec, inParameter(paramLabel, err)
	}
	return spec, inParameter(paramFormatOptions, fs.CheckOptions(spec.Options))
}

// formatOptions reads "key=value,key=value".
func formatOptions(s string) (map[string]string, error) {
	if s == "" {
		return nil, nil
	}
	options := map[string]string{}
	for o := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(o, "=")
		if _, twice := options[key]; !ok || key == "" || twice {
			return nil, invalid("parameter %s %.64q: must be key=value,key=value, each key once", paramFormatOptions, s)
		}
		options[key] = value
	}
	return options, nil
}

// sizeOf reads a capacity range.
func sizeOf(r *csi.CapacityRange) (volume.Size, error) {
	size := volume.Size{Required: r.GetRequiredBytes(), Limit: r.GetLimitBytes()}
	switch {
	case size.Required < 0:
		return size, outOfRange("capacity_range.required_bytes %d: must not be negative", size.Required)
	case size.Limit < 0:
		return size, outOfRange("capacity_range.limit_bytes %d: must not be negative", size.Limit)
	case size.Limit > 0 && size.Limit < size.Required:
		return size, outOfRange("capacity_range: limit_bytes %d is less than required_bytes %d; raise the limit", size.Limit, size.Required)
	}
	return size, nil
}

// sourceOf reads what a volume is to be a copy of.
func sourceOf(s *csi.VolumeContentSource) (volume.Source, error) {
	var source volume.Source
	switch s.GetType().(type) {
	case *csi.VolumeContentSource_Snapshot:
		if source.Snapshot = s.GetSnapshot().GetSnapshotId(); source.Snapshot == "" {
			return source, invalid("volume_content_source.snapshot.snapshot_id: must not be empty")
		}
	case *csi.VolumeContentSource_Volume:
		if source.Volume = s.GetVolume().GetVolumeId(); source.Volume == "" {
			return source, invalid("volume_content_source.volume.volume_id: must not be empty")
		}
	default:
		if s != nil {
			return source, invalid("volume_content_source: must be a snapshot or a volume")
		}
	}
	return source, nil
}
