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
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// class is what the parameters of a StorageClass say, one field for each.
type class struct {
	fsType  *diskfs.Filesystem // nil: not given
	content string             // "": not given
	image.Lineage
	format        string
	formatGiven   bool
	formatOptions string
	label         string
	provisioning  image.Provisioning
	publishAs     image.Mode // "": not given
}

const (
	paramContent       = "content"
	paramFormat        = "format"
	paramFormatOptions = "formatOptions"
	paramLabel         = "label"
	paramProvisioning  = "provisioning"
	paramPublishAs     = "publishAs"
	paramFSType        = kubeletPrefix + "fstype"
	paramNamespace     = kubeletPrefix + "pvc/namespace" // the provisioner's, with --extra-create-metadata

	formatNone = "none"
)

type classParameter struct {
	setting
	read func(c *class, value string) error
}

// classParameters has every parameter of a StorageClass. To add one, add its row, its field
// in class, and its use in classRequest. A new field of [volume.ClaimRequest] must also be
// compared in package volume; a test finds a forgotten one.
var classParameters = []classParameter{
	{setting{paramFSType, filesystemsSetting, "`ext4`, or that of the content or golden", "the filesystem of a mounted volume"},
		func(c *class, v string) (err error) {
			c.fsType, err = filesystemNamed("parameter "+paramFSType, v)
			return err
		}},
	{setting{paramLabel, labelSetting, "none", "the filesystem's label"},
		func(c *class, v string) error {
			c.label = v
			return nil
		}},
	{setting{paramFormatOptions, "`KEY=VALUE,…`, each key once; [those of the filesystem](filesystems.md)",
		"the filesystem's own", "how it is formatted"},
		func(c *class, v string) error {
			c.formatOptions = v
			return nil
		}},
	{setting{paramContent, contentSetting, "none", "what is inside from the start"},
		func(c *class, v string) (err error) {
			c.content, err = contentNamed("parameter "+paramContent, v)
			return err
		}},
	{setting{paramProvisioning, "`thin`, `thick`", "`thin`",
		"whether its space is taken as it is written, or reserved from the start"},
		func(c *class, v string) (err error) {
			if c.provisioning, err = image.ParseProvisioning(v); err != nil {
				err = invalid("parameter %s %w", paramProvisioning, err)
			}
			return err
		}},
	{setting{paramPublishAs, "`filesystem`, `diskImage`", "`filesystem`",
		"what a pod's directory has: the files, or `disk.img` for a VM"},
		func(c *class, v string) (err error) {
			c.publishAs, err = mountMode("parameter "+paramPublishAs, v)
			return err
		}},
	{setting{paramFormat, "`none`, `btrfs`, `ext4`, `xfs`",
		"`none` for `volumeMode: Block`; the filesystem for `diskImage`", "what a disk is formatted with, and a mounted volume, unless the fsType says so"},
		func(c *class, v string) error {
			c.format, c.formatGiven = v, true
			return nil
		}},
	{fromSetting, func(c *class, v string) error { return givenText(&c.From, "parameter "+attrFrom, v) }},
	{orElseSetting, func(c *class, v string) error { return givenText(&c.OrElse, "parameter "+attrOrElse, v) }},
	{commitToSetting("the claim is deleted"), func(c *class, v string) error { return givenText(&c.CommitTo, "parameter "+attrCommitTo, v) }},
	{commitWhenSetting, func(c *class, v string) error { return givenText(&c.CommitWhen, "parameter "+attrCommitWhen, v) }},
}

// readClass reads the parameters of a StorageClass, each by itself.
func readClass(params map[string]string, block bool) (class, error) {
	var c class
	var names []string
	for _, p := range classParameters {
		names = append(names, p.name)
	}
	for _, key := range slices.Sorted(maps.Keys(params)) {
		// Other keys with the prefix are the provisioner's, as with --extra-create-metadata.
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.Contains(names, key) {
			return c, unknownSetting("parameter", key, names)
		}
	}
	for _, p := range classParameters {
		value, given := params[p.name]
		if !given || block && (p.name == paramFSType || p.name == paramPublishAs) { // these are for mounted volumes
			continue
		}
		if err := p.read(&c, value); err != nil {
			return c, err
		}
	}
	return c, nil
}

// maxName is the limit of CSI for a name ("Size Limits"), in bytes.
const maxName = 128

// checkName checks a name that a container orchestrator suggests (CSI 1.13,
// CreateVolumeRequest.name).
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

// claimRequest checks a CreateVolume request, and makes the request of package volume from
// it. It looks at nothing but the request.
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

// classRequest reads the part of a request that capabilities and parameters decide:
// everything but name, size and source. Without capabilities it assumes those that fit the
// parameters.
func classRequest(capabilities []*csi.VolumeCapability, params map[string]string) (volume.ClaimRequest, error) {
	var r volume.ClaimRequest
	u, err := useOfAll(capabilities)
	if err != nil {
		return r, err
	}
	if len(capabilities) == 0 { // the provisioner asks for capacity so; other formats mean the same for both modes
		u.Block = params[paramFormat] == formatNone && params[paramPublishAs] == ""
	}
	c, err := readClass(params, u.Block)
	if err != nil {
		return r, err
	}
	if v, given := params[paramPublishAs]; u.Block && given {
		return r, invalid("parameter %s %.64q: does not go with volumeMode Block, which is published as a device; use another StorageClass", paramPublishAs, v)
	}
	// The provisioner makes fstype part of the capability. Other callers may not.
	if c.fsType != nil {
		if u.Filesystem != "" && u.Filesystem != c.fsType.Name {
			return r, invalid("parameter %s %.64q: fsType asks for %q; give one of them", paramFSType, c.fsType.Name, u.Filesystem)
		}
		u.Filesystem = c.fsType.Name
	}
	r.Mode = cmp.Or(c.publishAs, image.ModeFilesystem)
	if u.Block {
		r.Mode = image.ModeBlock
	}
	r.Provisioning, r.Namespace = c.provisioning, params[paramNamespace]
	r.Lineage = c.Lineage
	if r.Spec, err = c.spec(r.Mode, u.Filesystem); err == nil {
		err = r.Validate()
	}
	// An fsType says how a new volume is formatted. It is in nearly all classes, so it does not contradict a source.
	r.AnyFilesystem, r.AnyMode = !c.formatGiven || c.format == formatNone, !u.Block && c.publishAs == ""
	r.DefaultSpec = u.Filesystem == "" && c.format == "" && c.label == "" && c.formatOptions == ""
	return r, err
}

// withMode leaves out capabilities without an access mode. Older provisioners ask for
// capacity with such a capability, where newer ones send none.
func withMode(capabilities []*csi.VolumeCapability) []*csi.VolumeCapability {
	return slices.DeleteFunc(slices.Clone(capabilities), func(c *csi.VolumeCapability) bool {
		return c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_UNKNOWN
	})
}

// useOfAll reads several capabilities. The volume must have all of them.
func useOfAll(capabilities []*csi.VolumeCapability) (volume.Use, error) {
	var all volume.Use
	for i, c := range capabilities {
		u, err := useOf(c, image.Claim)
		if err != nil {
			return u, err
		}
		if i > 0 && u.Block != all.Block {
			return u, invalid("volume_capabilities: have both block and mount: a volume has one access type")
		}
		if all.Filesystem != "" && u.Filesystem != "" && u.Filesystem != all.Filesystem {
			return u, invalid("volume_capabilities: have the filesystems %q and %q: a volume has one", all.Filesystem, u.Filesystem)
		}
		all.Block, all.Filesystem = u.Block, cmp.Or(all.Filesystem, u.Filesystem)
	}
	return all, nil
}

// spec decides the content of a volume. The parameter format decides whether a disk is formatted, and how. For a volume
// that is mounted, it is another way to name the filesystem, so that a class for disks serves mounted volumes too.
func (c class) spec(mode image.Mode, fsType string) (diskfs.Spec, error) {
	var spec diskfs.Spec
	if mode == image.ModeFilesystem {
		c.formatGiven = c.formatGiven && c.format != formatNone // which is the default of a disk, and says nothing here
		if err := c.checkFormat(fsType); err != nil {
			return spec, err
		}
	}
	if c.formatGiven && c.format == formatNone || mode == image.ModeBlock && !c.formatGiven {
		return diskfs.Spec{Filesystem: diskfs.Disk, Content: c.content}, c.checkUnformatted()
	}
	field, name, allowed := "fsType", cmp.Or(fsType, diskfs.Default), diskfs.Names()
	if c.formatGiven {
		field, name, allowed = "parameter "+paramFormat, c.format, append([]string{formatNone}, allowed...)
	}
	fs, err := diskfs.Lookup(name)
	if err != nil || !fs.Formatted() {
		return spec, invalid("%s %.64q: must be one of %s", field, name, strings.Join(allowed, ", "))
	}
	spec = diskfs.Spec{Filesystem: fs.Name, Label: c.label, Content: c.content}
	if !c.formatGiven && (c.content != "" && fsType == "" || c.From != "" && c.mayBeDefault(fsType)) {
		spec.Filesystem = "" // the content or golden decides
	}
	if spec.Options, err = formatOptions(c.formatOptions); err != nil {
		return spec, err
	}
	if err := fs.CheckLabel(spec.Label); err != nil {
		return spec, inParameter(paramLabel, err)
	}
	return spec, inParameter(paramFormatOptions, fs.CheckOptions(spec.Options))
}

// mayBeDefault reports whether nobody may have asked for an fsType. The external-provisioner puts the class's fsType into
// the capability, and the ext4 of its --default-fstype where the class has none. Nobody can tell this ext4 from one of
// the class, so it gives way to the parameter format, and to a golden.
func (c class) mayBeDefault(fsType string) bool {
	return fsType == "" || fsType == diskfs.Default && c.fsType == nil
}

// checkFormat returns [errdefs.ErrInvalid] if format and fsType name two filesystems of one mounted volume.
func (c class) checkFormat(fsType string) error {
	if !c.formatGiven || c.mayBeDefault(fsType) || fsType == c.format {
		return nil
	}
	return invalid("parameter %s %.64q: a mounted volume has one filesystem, and fsType (%s) is %q; set both to the same, or leave fsType out",
		paramFormat, c.format, paramFSType, fsType)
}

// checkUnformatted returns [errdefs.ErrInvalid] if a disk without a filesystem was given the
// parameters of a filesystem.
func (c class) checkUnformatted() error {
	name, value := paramLabel, c.label
	if value == "" {
		name, value = paramFormatOptions, c.formatOptions
	}
	if value == "" {
		return nil
	}
	return invalid("parameter %s %.64q: the disk is not formatted; set parameter %s to one of %s, or leave this one out", name, value, paramFormat, strings.Join(diskfs.Names(), ", "))
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

// sourceOf reads the snapshot or volume that a claim copies.
func sourceOf(s *csi.VolumeContentSource) (image.Source, error) {
	var source image.Source
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
