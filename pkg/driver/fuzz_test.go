// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// watchdog ends a process whose fuzzed call does not return. The fuzzer itself would wait for it and report nothing.
func watchdog(what string) (done func() bool) {
	return time.AfterFunc(30*time.Second, func() { panic(what + " does not return") }).Stop
}

// refused checks the answer to a hostile request. Its message becomes part of an event, whose note has at most 1 kB
// (events.k8s.io/v1).
func refused(t *testing.T, err error, allowed ...codes.Code) {
	t.Helper()
	const maxMessage = 1024
	text := err.Error()
	if !slices.Contains(allowed, code(err)) || !utf8.ValidString(text) || len(text) > maxMessage {
		t.Errorf("%s, %d bytes: %.300q", code(err), len(text), text)
	}
	for _, fault := range plain.Faults(text) {
		t.Errorf("%s: %.300q", fault, text)
	}
}

// safeName checks a name of a file in the pool, or an id in a token.
func safeName(t *testing.T, id string) {
	t.Helper()
	if id == "" || len(id) > 128 || !filepath.IsLocal(id) || filepath.Base(id) != id || strings.HasPrefix(id, ".") ||
		strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		t.Errorf("%q is not a safe name", id)
	}
}

// wellFormed checks a request's spec by the filesystem's limits.
func wellFormed(t *testing.T, s diskfs.Spec) {
	t.Helper()
	fs, err := diskfs.Lookup(s.Filesystem)
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.CheckLabel(s.Label); err != nil {
		t.Error(err)
	}
	if err := fs.CheckOptions(s.Options); err != nil {
		t.Error(err)
	}
}

// hostile are texts that a check might let through, or that a message might repeat too often.
var hostile = []string{
	"", "ext4", "xfs", "1Gi", "1e999999999", "diskImage", "../x", "-F", "\xff", strings.Repeat("\U000e0001", 300), strings.Repeat("x", 4096),
	"journal=off,inode-size=1024", strings.Repeat("a=b,", 300), "none", "raw", "thick", "suid,dev,noexec",
	`context="u:r:t:s0:c1"`, "context=u:r:t,ro", `context="`, "context=" + strings.Repeat("x:", 300),
}

// capability makes a capability in which everything may be wrong.
func capability(kind uint8, fsType, flag string, mode int32) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_Mode(mode)}}
	switch kind % 4 {
	case 0:
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}}
		if flag != "" {
			c.GetMount().MountFlags = strings.Split(flag, ",")
		}
	case 1:
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	case 2: // no access type
	case 3:
		return nil
	}
	return c
}

// FuzzPublishRequest asks for inline volumes as anybody who may create a pod can, and for claims as kubelet might.
func FuzzPublishRequest(f *testing.F) {
	const single = int32(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
	f.Add("csi-0123", "/var/lib/kubelet/t", uint8(0), "ext4", "ro,noatime", single, uint8(7), "1Gi", "data", "diskImage", "", "")
	f.Add("csi-0123", "/var/lib/kubelet/t", uint8(0), "", "", single, uint8(1), "1.5Gi", "", "", "", "")
	for _, h := range hostile {
		f.Add("v", "/t", uint8(0), "ext4", "", single, uint8(1), h, "", "", "", "")
		f.Add("v", "/t", uint8(0), "btrfs", "", single, uint8(2), "", h, "", "", "")
		f.Add("v", "/t", uint8(0), "xfs", "", single, uint8(4), "", "", h, "", "")
		f.Add("v", "/t", uint8(0), "ext4", h, single, uint8(0), "", "", "", "", "")
		f.Add("v", "/t", uint8(0), h, "", single, uint8(0), "", "", "", "", "")
		f.Add("v", "/t", uint8(0), "", "", single, uint8(8), "", "", "", h, h)
		f.Add("v", "/t", uint8(0), "", "", single, uint8(8), "", "", "", attrDurability, h)
		f.Add(h, "/t", uint8(0), "", "", single, uint8(0), "", "", "", "", "")
		f.Add("v", h, uint8(1), "", "", single, uint8(0), "", "", "", "", "")
	}
	f.Fuzz(func(t *testing.T, id, target string, kind uint8, fsType, flag string, mode int32, given uint8, size, label, publishAs, key, value string) {
		defer watchdog("inlineRequest")()
		context := map[string]string{keyEphemeral: "true", keyPodName: value}
		for i, attr := range [][2]string{{attrSize, size}, {attrLabel, label}, {attrPublishAs, publishAs}, {key, value}} {
			if given&(1<<i) != 0 {
				context[attr[0]] = attr[1]
			}
		}
		req := &csi.NodePublishVolumeRequest{
			VolumeId: id, TargetPath: target, VolumeCapability: capability(kind, fsType, flag, mode), VolumeContext: context, Readonly: given&0x80 != 0,
		}
		r, err := inlineRequest(req)
		if err != nil {
			refused(t, err, codes.InvalidArgument, codes.OutOfRange)
		} else {
			inlineAccepted(t, req, r)
		}

		req.StagingTargetPath = target
		if r, err := publishRequest(req); err != nil {
			refused(t, err, codes.InvalidArgument, codes.FailedPrecondition)
		} else if safeName(t, r.ID); strings.HasSuffix(r.Target, "/") || r.Staging == "" || r.Block && r.Access != (image.Access{ReadOnly: r.ReadOnly}) {
			t.Errorf("accepted %+v", r)
		}
		if r, err := stageRequest(&csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: target, VolumeCapability: req.VolumeCapability}); err != nil {
			refused(t, err, codes.InvalidArgument)
		} else {
			safeName(t, r.ID)
		}
	})
}

// inlineAccepted checks the request that pkg/volume gets for an inline volume.
func inlineAccepted(t *testing.T, req *csi.NodePublishVolumeRequest, r volume.InlineRequest) {
	t.Helper()
	if err := r.Validate(); err != nil {
		t.Fatalf("accepted %+v: %v", r, err)
	}
	safeName(t, r.ID)
	wellFormed(t, r.Spec)
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if err != nil || !fs.Formatted() || r.Spec.Size%mib != 0 || r.Spec.Size < fs.MinSize || r.Spec.Size > fs.MaxSize || len(r.Spec.Options) > 0 {
		t.Errorf("accepted %+v: %v", r.Spec, err)
	}
	if asked := req.GetVolumeCapability().GetMount().GetFsType(); asked != "" && asked != fs.Name {
		t.Errorf("%s was asked for, not %s", asked, fs.Name)
	}
	// Only an administrator may ask for these.
	if r.SUID || r.Dev || r.NoExec || req.GetReadonly() && !r.ReadOnly {
		t.Errorf("access %s", r.Access)
	}
	for key := range req.GetVolumeContext() {
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.ContainsFunc(attributes, func(a attribute) bool { return a.name == key }) {
			t.Errorf("accepted the attribute %q", key)
		}
	}
}

// FuzzClaimRequest reads a StorageClass as an administrator might write it, the rest of CreateVolume, and the names and
// tokens of snapshots and lists.
func FuzzClaimRequest(f *testing.F) {
	const single = int32(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)
	f.Add("pvc-1", uint8(0), "", "", single, uint8(0x3e), "", "journal=off", "data", "thick", "diskImage", "ext4", "", int64(1), int64(mib), "snap", "")
	f.Add("a/b", uint8(1), "", "", single, uint8(0x01), "xfs", "", "", "", "", "", "", int64(0), int64(0), "", "vol")
	for _, h := range hostile {
		f.Add(h, uint8(0), h, h, single, uint8(0), "", "", "", "", "", "", "", int64(0), int64(0), "", "")
		for i := range 7 {
			text := slices.Repeat([]string{""}, 7)
			text[i] = h
			f.Add("n", uint8(i%2), "ext4", "", single, uint8(1<<i), text[0], text[1], text[2], text[3], text[4], text[5], text[6], int64(-1), int64(1), h, h)
			f.Add("n", uint8(i%2), "", "", single, uint8(1<<i), text[0], text[1], text[2], text[3], text[4], text[5], text[6], int64(0), int64(0), "", "")
		}
	}
	f.Fuzz(func(t *testing.T, name string, kind uint8, fsType, flag string, mode int32, given uint8,
		format, options, label, provisioning, publishAs, paramFS, key string, required, limit int64, snapshot, source string) {
		params := map[string]string{}
		for i, p := range [][2]string{
			{paramFormat, format}, {paramFormatOptions, options}, {paramLabel, label}, {paramProvisioning, provisioning},
			{paramPublishAs, publishAs}, {paramFSType, paramFS}, {key, label},
		} {
			if given&(1<<i) != 0 {
				params[p[0]] = p[1]
			}
		}
		req := &csi.CreateVolumeRequest{
			Name: name, Parameters: params, VolumeCapabilities: []*csi.VolumeCapability{capability(kind, fsType, flag, mode)},
			CapacityRange: &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit},
		}
		if snapshot != "" {
			req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
				Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
		} else if source != "" {
			req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
				Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: source}}}
		}
		r, err := claimRequest(req)
		if err != nil {
			refused(t, err, codes.InvalidArgument, codes.OutOfRange)
		} else {
			claimAccepted(t, req, r)
		}
		// The provisioner asks for capacity without any capability.
		if r, err := classRequest(nil, params); err != nil {
			refused(t, err, codes.InvalidArgument)
		} else {
			wellFormed(t, r.Spec)
		}
		idsOf(t, name, source)
	})
}

// claimAccepted checks the request that pkg/volume gets for a claim.
func claimAccepted(t *testing.T, req *csi.CreateVolumeRequest, r volume.ClaimRequest) {
	t.Helper()
	wellFormed(t, r.Spec)
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	block := req.GetVolumeCapabilities()[0].GetBlock() != nil
	required := req.GetCapacityRange().GetRequiredBytes()
	switch {
	case err != nil, block != (r.Mode == image.ModeBlock), r.Mode == image.ModeFilesystem && !fs.Formatted():
		t.Errorf("accepted the mode %s and %s: %v", r.Mode, r.Spec, err)
	case r.Spec.Size < required, r.Spec.Size%mib != 0 && r.Spec.Size <= diskfs.MaxSize, r.Limit < 0, r.Limit > 0 && r.Limit < required:
		t.Errorf("accepted %d bytes, at most %d, for %d", r.Spec.Size, r.Limit, required)
	case r.DefaultSpec && (r.Spec.Label != "" || len(r.Spec.Options) > 0):
		t.Errorf("%s is not the default", r.Spec)
	}
	for key := range req.GetParameters() {
		if !strings.HasPrefix(key, kubeletPrefix) && !slices.ContainsFunc(classParameters, func(p classParameter) bool { return p.name == key }) {
			t.Errorf("accepted the parameter %q", key)
		}
	}
}

// idsOf checks that every name makes a safe id, and that a list can go on after it.
func idsOf(t *testing.T, name, token string) {
	t.Helper()
	if err := checkName(name); err != nil {
		refused(t, err, codes.InvalidArgument)
	}
	for _, id := range []string{volume.ClaimRequest{Name: name}.ID(), volume.SnapshotID(name)} {
		safeName(t, id)
		if err := checkVolumeID(id); err != nil {
			t.Error(err)
		}
		next := tokenAfter(id)
		if got, err := startingAfter(next, 1); err != nil || got != id || len(next) > 128 {
			t.Errorf("%q leads to %q: %v", next, got, err)
		}
	}
	id, err := startingAfter(token, 0)
	if err != nil {
		refused(t, err, codes.Aborted)
	} else if tokenAfter(id) != token {
		t.Errorf("%q leads to %q", token, id)
	}
	if err := checkVolumeID(token); err != nil {
		refused(t, err, codes.InvalidArgument)
	} else {
		safeName(t, token)
	}
}
