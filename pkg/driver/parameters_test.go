// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"maps"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// mounted is a capability that a provisioner sends.
func mounted(fsType string) *csi.VolumeCapability { return harness.Mounted(fsType) }

// device is a capability that a provisioner sends.
func device() *csi.VolumeCapability { return harness.Block() }

// create is the request that a provisioner makes for a claim.
func create(c *csi.VolumeCapability, params ...string) *csi.CreateVolumeRequest {
	parameters := pairs(params)
	parameters[kubeletPrefix+"pvc/name"] = "data"
	return &csi.CreateVolumeRequest{Name: "pvc-0123", VolumeCapabilities: []*csi.VolumeCapability{c}, Parameters: parameters}
}

func sized64(required, limit int64) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}
	}
}

func TestClaimRequest(t *testing.T) {
	type want = volume.ClaimRequest
	fs := func(name string) diskfs.Spec { return diskfs.Spec{Filesystem: name} }
	for name, c := range map[string]struct {
		req    *csi.CreateVolumeRequest
		change func(*csi.CreateVolumeRequest)
		want   want
	}{
		"nothing said":     {req: create(mounted("")), want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem, DefaultSpec: true}},
		"xfs":              {req: create(mounted("xfs")), want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem}},
		"as a parameter":   {req: create(mounted(""), paramFSType, "btrfs"), want: want{Spec: fs("btrfs"), Mode: image.ModeFilesystem}},
		"said twice":       {req: create(mounted("xfs"), paramFSType, "xfs"), want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem}},
		"label":            {req: create(mounted("ext4"), "label", "data"), want: want{Spec: diskfs.Spec{Filesystem: "ext4", Label: "data"}, Mode: image.ModeFilesystem}},
		"options":          {req: create(mounted("ext4"), "formatOptions", "journal=off,inode-size=512"), want: want{Spec: diskfs.Spec{Filesystem: "ext4", Options: map[string]string{"journal": "off", "inode-size": "512"}}, Mode: image.ModeFilesystem}},
		"thick":            {req: create(mounted("ext4"), "provisioning", "thick"), want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem, Provisioning: image.Thick}},
		"thin":             {req: create(mounted("ext4"), "provisioning", "thin"), want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem}},
		"as a filesystem":  {req: create(mounted("ext4"), "publishAs", "filesystem"), want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem}},
		"disk image":       {req: create(mounted("ext4"), "publishAs", "diskImage"), want: want{Spec: fs("ext4"), Mode: image.ModeDiskImage}},
		"empty disk image": {req: create(mounted("ext4"), "publishAs", "diskImage", "format", "none"), want: want{Spec: fs("raw"), Mode: image.ModeDiskImage}},
		"xfs disk image":   {req: create(mounted("ext4"), "publishAs", "diskImage", "format", "xfs"), want: want{Spec: fs("xfs"), Mode: image.ModeDiskImage}},
		"format of a mount": {req: create(mounted("ext4"), "format", "xfs", "label", "l"),
			want: want{Spec: diskfs.Spec{Filesystem: "xfs", Label: "l"}, Mode: image.ModeFilesystem}},
		"format, no fsType":      {req: create(mounted(""), "format", "btrfs"), want: want{Spec: fs("btrfs"), Mode: image.ModeFilesystem}},
		"format and fsType":      {req: create(mounted("xfs"), "format", "xfs"), want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem}},
		"format none of a mount": {req: create(mounted("xfs"), "format", "none"), want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem}},
		"block":                  {req: create(device()), want: want{Spec: fs("raw"), Mode: image.ModeBlock, DefaultSpec: true}},
		"formatted block":        {req: create(device(), "format", "btrfs", "label", "l"), want: want{Spec: diskfs.Spec{Filesystem: "btrfs", Label: "l"}, Mode: image.ModeBlock}},
		"block, none":            {req: create(device(), "format", "none"), want: want{Spec: fs("raw"), Mode: image.ModeBlock}},
		"block, a class for both": {req: create(device(), paramFSType, "xfs"),
			want: want{Spec: fs("raw"), Mode: image.ModeBlock, DefaultSpec: true}},
		"size": {req: create(mounted("ext4")), change: sized64(gibibyte, 0), want: want{Spec: diskfs.Spec{Filesystem: "ext4", Size: gibibyte}, Mode: image.ModeFilesystem}},
		"size, rounded up": {req: create(mounted("ext4")), change: sized64(gibibyte+1, 2*gibibyte),
			want: want{Spec: diskfs.Spec{Filesystem: "ext4", Size: gibibyte + mib}, Limit: 2 * gibibyte, Mode: image.ModeFilesystem}},
		"golden, with the provisioner's fsType": {req: create(mounted("ext4"), "from", "golden/cache"),
			want: want{Mode: image.ModeFilesystem, Lineage: image.Lineage{From: "golden/cache"}}},
		"golden, on xfs": {req: create(mounted("xfs"), "from", "golden/cache"),
			want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem, Lineage: image.Lineage{From: "golden/cache"}}},
		"content": {req: create(mounted(""), "content", "pg"),
			want: want{Spec: diskfs.Spec{Content: "pg"}, Mode: image.ModeFilesystem, DefaultSpec: true}},
		"content of a namespace": {req: create(mounted(""), "content", "pg", paramNamespace, "shop"),
			want: want{Spec: diskfs.Spec{Content: "pg"}, Mode: image.ModeFilesystem, DefaultSpec: true, Namespace: "shop"}},
		"content on xfs": {req: create(mounted("xfs"), "content", "pg", "label", "l"),
			want: want{Spec: diskfs.Spec{Filesystem: "xfs", Label: "l", Content: "pg"}, Mode: image.ModeFilesystem}},
		"content of a device": {req: create(device(), "content", "fedora"),
			want: want{Spec: diskfs.Spec{Filesystem: "raw", Content: "fedora"}, Mode: image.ModeBlock, DefaultSpec: true}},
		"content of a disk image": {req: create(mounted("ext4"), "content", "fedora", "publishAs", "diskImage"),
			want: want{Spec: diskfs.Spec{Filesystem: "ext4", Content: "fedora"}, Mode: image.ModeDiskImage}},
		"content, formatted": {req: create(device(), "content", "pg", "format", "xfs"),
			want: want{Spec: diskfs.Spec{Filesystem: "xfs", Content: "pg"}, Mode: image.ModeBlock}},
		"limit alone": {req: create(mounted("ext4")), change: sized64(0, gibibyte), want: want{Spec: fs("ext4"), Limit: gibibyte, Mode: image.ModeFilesystem}},
		"of a snapshot": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: "s"}}}
		}, want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem, DefaultSpec: true, Source: image.Source{Snapshot: "s"}}},
		"of a volume": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: "v"}}}
		}, want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem, DefaultSpec: true, Source: image.Source{Volume: "v"}}},
		"several capabilities": {req: create(mounted("xfs")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities = append(r.VolumeCapabilities, mounted("xfs"))
		}, want: want{Spec: fs("xfs"), Mode: image.ModeFilesystem}},
		"a long name": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.Name = strings.Repeat("é", 64) },
			want: want{Spec: fs("ext4"), Mode: image.ModeFilesystem, DefaultSpec: true}},
	} {
		t.Run(name, func(t *testing.T) {
			if c.change != nil {
				c.change(c.req)
			}
			c.want.Name = c.req.GetName()
			got, err := claimRequest(c.req)
			if err != nil {
				t.Fatal(err)
			}
			if !got.Spec.Equal(c.want.Spec) || !maps.Equal(got.Spec.Options, c.want.Spec.Options) {
				t.Errorf("asks for %s, not %s", got.Spec, c.want.Spec)
			}
			got.Spec, c.want.Spec = diskfs.Spec{}, diskfs.Spec{}
			if got.Name != c.want.Name || got.Mode != c.want.Mode || got.Provisioning != c.want.Provisioning || got.Limit != c.want.Limit ||
				got.Source != c.want.Source || got.Namespace != c.want.Namespace || got.DefaultSpec != c.want.DefaultSpec {
				t.Errorf("is  %+v\nnot %+v", got, c.want)
			}
		})
	}
}

// TestWhatASourceMayDecide checks which parameters leave the filesystem and the mode to the source of a copy.
func TestWhatASourceMayDecide(t *testing.T) {
	type open struct{ filesystem, mode bool }
	for name, c := range map[string]struct {
		req  *csi.CreateVolumeRequest
		want open
	}{
		"fsType":    {create(mounted("btrfs"), paramFSType, "btrfs"), open{true, true}},
		"none":      {create(mounted("ext4"), paramFormat, "none"), open{true, true}},
		"format":    {create(mounted("ext4"), paramFormat, "xfs"), open{false, true}},
		"publishAs": {create(mounted("ext4"), paramPublishAs, "filesystem"), open{true, false}},
		"block":     {create(device()), open{true, false}},
	} {
		r, err := claimRequest(c.req)
		if got := (open{r.AnyFilesystem, r.AnyMode}); err != nil || got != c.want {
			t.Errorf("%s: %+v, want %+v: %v", name, got, c.want, err)
		}
	}
}

const gibibyte = 1 << 30

// TestBadClaimRequest reads the messages as the owner of a claim finds them in its events.
func TestBadClaimRequest(t *testing.T) {
	const allowed = "csi.storage.k8s.io/fstype, label, formatOptions, content, provisioning, publishAs, format, from, orElse, commitTo, commitWhen"
	bad, outside := codes.InvalidArgument, codes.OutOfRange
	for name, c := range map[string]struct {
		req    *csi.CreateVolumeRequest
		change func(*csi.CreateVolumeRequest)
		code   codes.Code
		says   []string
	}{
		"unknown parameter":   {req: create(mounted(""), "siez", "1Gi"), code: bad, says: []string{"parameter", `"siez"`, allowed}},
		"parameter by case":   {req: create(mounted(""), "publishas", "filesystem"), code: bad, says: []string{`"publishas"`, allowed}},
		"size as a parameter": {req: create(mounted(""), "size", "1Gi"), code: bad, says: []string{`"size"`, "resources.requests.storage"}},
		"durability":          {req: create(mounted(""), "durability", "volatile"), code: bad, says: []string{"parameter", `"durability"`, "is for inline volumes"}},
		"unknown filesystem":  {req: create(mounted("zfs")), code: bad, says: []string{"fsType", `"zfs"`, "btrfs, ext4, xfs"}},
		"fstype parameter":    {req: create(mounted(""), paramFSType, "zfs"), code: bad, says: []string{paramFSType, `"zfs"`, "btrfs, ext4, xfs"}},
		"two filesystems":     {req: create(mounted("xfs"), paramFSType, "ext4"), code: bad, says: []string{paramFSType, `"ext4"`, `"xfs"`}},
		"raw filesystem":      {req: create(mounted("raw")), code: bad, says: []string{`"raw"`, "btrfs, ext4, xfs"}},
		"publishAs":           {req: create(mounted(""), "publishAs", "block"), code: bad, says: []string{"publishAs", `"block"`, "filesystem, diskImage"}},
		"publishAs of block":  {req: create(device(), "publishAs", "diskImage"), code: bad, says: []string{"publishAs", `"diskImage"`, "volumeMode Block"}},
		"provisioning":        {req: create(mounted(""), "provisioning", "fat"), code: bad, says: []string{"provisioning", `"fat"`, "thin, thick"}},
		"format and fsType":   {req: create(mounted("btrfs"), "format", "xfs"), code: bad, says: []string{`format "xfs"`, `fsType`, `"btrfs"`, "leave fsType out"}},
		"format and ext4":     {req: create(mounted(""), paramFSType, "ext4", "format", "xfs"), code: bad, says: []string{`format "xfs"`, paramFSType, `"ext4"`}},
		"format of a mount":   {req: create(mounted("ext4"), "format", "zfs"), code: bad, says: []string{"format", `"zfs"`, "btrfs, ext4, xfs"}},
		"format":              {req: create(device(), "format", "zfs"), code: bad, says: []string{"format", `"zfs"`, "none, btrfs, ext4, xfs"}},
		"format, raw":         {req: create(device(), "format", "raw"), code: bad, says: []string{"format", `"raw"`, "none, btrfs, ext4, xfs"}},
		"from":                {req: create(mounted(""), "from", "x"), code: bad, says: []string{"parameter from", `"x"`, "golden/NAME or shared/NAME"}},
		"from, empty":         {req: create(mounted(""), "from", ""), code: bad, says: []string{"parameter from", "empty", "leave it out"}},
		"commitTo of a disk":  {req: create(device(), "commitTo", "x"), code: bad, says: []string{"parameter commitTo", `"x"`, "mounted filesystems"}},
		"commitWhen":          {req: create(mounted(""), "commitTo", "x", "commitWhen", "later"), code: bad, says: []string{"parameter commitWhen", `"later"`, "marked, always"}},
		"content":             {req: create(mounted(""), "content", "a/b"), code: bad, says: []string{"parameter content", `"a/b"`, "lower case letters"}},
		"content, empty":      {req: create(mounted(""), "content", ""), code: bad, says: []string{"parameter content", "empty", "leave it out"}},
		"label of nothing":    {req: create(device(), "label", "x"), code: bad, says: []string{"label", `"x"`, "format"}},
		"options of nothing":  {req: create(device(), "format", "none", "formatOptions", "journal=off"), code: bad, says: []string{"formatOptions", "journal=off", "format"}},
		"label":               {req: create(mounted("xfs"), "label", "thirteen-char"), code: bad, says: []string{"label", "thirteen-char", "12"}},
		"unknown option":      {req: create(mounted("ext4"), "formatOptions", "speed=high"), code: bad, says: []string{"formatOptions", `"speed"`, "inode-size"}},
		"option's value":      {req: create(mounted("ext4"), "formatOptions", "journal=maybe"), code: bad, says: []string{"formatOptions", `"maybe"`, "on, off"}},
		"option of another":   {req: create(mounted("xfs"), "formatOptions", "journal=off"), code: bad, says: []string{"formatOptions", "journal", "inode-size"}},
		"options' form":       {req: create(mounted("ext4"), "formatOptions", "journal"), code: bad, says: []string{"formatOptions", `"journal"`, "key=value"}},
		"option twice":        {req: create(mounted("ext4"), "formatOptions", "journal=on,journal=off"), code: bad, says: []string{"formatOptions", "once"}},
		"options as arguments": {req: create(mounted("ext4"), "formatOptions", "-E lazy=1"), code: bad,
			says: []string{"formatOptions", `"-E lazy"`}},

		"no name":           {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.Name = "" }, code: bad, says: []string{"name", "empty"}},
		"name of 129 bytes": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.Name = strings.Repeat("n", 129) }, code: bad, says: []string{"name", "129", "128"}},
		"name with NUL":     {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.Name = "a\x00" }, code: bad, says: []string{"name", `"a\x00"`, "control"}},
		"name, not UTF-8":   {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.Name = "\xff" }, code: bad, says: []string{"name", "UTF-8"}},
		"no capabilities": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = nil }, code: bad,
			says: []string{"volume_capabilities", "empty"}},
		"a nil capability": {req: create(nil), code: bad, says: []string{"volume_capability", "empty"}},
		"both kinds": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = append(r.VolumeCapabilities, device()) }, code: bad,
			says: []string{"volume_capabilities", "block", "mount"}},
		"two fsTypes": {req: create(mounted("xfs")), change: func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = append(r.VolumeCapabilities, mounted("ext4")) }, code: bad,
			says: []string{"volume_capabilities", `"xfs"`, `"ext4"`}},
		"many nodes": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		}, code: bad, says: []string{"accessModes", "MULTI_NODE_MULTI_WRITER", "ReadWriteOncePod"}},
		"mount flag": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeCapabilities[0].GetMount().MountFlags = []string{"data=journal"}
		}, code: bad, says: []string{"mountOptions", `"data=journal"`, "noexec"}},
		"mutable parameters": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{"iops": "1"} }, code: bad,
			says: []string{"mutable_parameters"}},
		"negative size":  {req: create(mounted("")), change: sized64(-1, 0), code: outside, says: []string{"required_bytes", "-1"}},
		"negative limit": {req: create(mounted("")), change: sized64(0, -1), code: outside, says: []string{"limit_bytes", "-1"}},
		"limit below":    {req: create(mounted("")), change: sized64(2, 1), code: outside, says: []string{"limit_bytes", "required_bytes"}},
		"source without a kind": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) { r.VolumeContentSource = &csi.VolumeContentSource{} }, code: bad,
			says: []string{"volume_content_source"}},
		"source without an id": {req: create(mounted("")), change: func(r *csi.CreateVolumeRequest) {
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{}}}
		}, code: bad, says: []string{"snapshot_id"}},
	} {
		t.Run(name, func(t *testing.T) {
			if c.change != nil {
				c.change(c.req)
			}
			_, err := claimRequest(c.req)
			t.Log(err)
			mustSay(t, toStatus(err), c.code, c.says...)
		})
	}
}

// TestClaimMountFlags checks the mount flags that an administrator may ask for and the author of a pod may not.
func TestClaimMountFlags(t *testing.T) {
	c := mounted("ext4")
	c.GetMount().MountFlags = []string{"ro", "noatime", "noexec", "suid", "dev", "rw", "exec", "relatime", "nosuid", "nodev"}
	u, err := useOf(c, image.Claim)
	if err != nil || u.Access != (image.Access{}) { // the last of contrary flags counts
		t.Errorf("%+v: %v", u, err)
	}
	c.GetMount().MountFlags = []string{"rw", "exec", "relatime", "nosuid", "nodev", "ro", "noatime", "noexec", "suid", "dev"}
	u, err = useOf(c, image.Claim)
	if want := (image.Access{ReadOnly: true, NoATime: true, NoExec: true, SUID: true, Dev: true}); err != nil || u.Access != want {
		t.Errorf("%+v: %v", u, err)
	}
	if _, err := useOf(c, image.Inline); err == nil || !strings.Contains(err.Error(), `"exec"`) {
		t.Errorf("inline: %v", err)
	}
	// Kubelet adds the SELinux context of the pod.
	c.GetMount().MountFlags = []string{"noatime", `context="system_u:object_r:container_file_t:s0:c27,c14"`}
	for _, of := range []image.Lifecycle{image.Inline, image.Claim} {
		u, err := useOf(c, of)
		if want := (image.Access{NoATime: true, Context: "system_u:object_r:container_file_t:s0:c14,c27"}); err != nil || u.Access != want {
			t.Errorf("%s: %+v: %v", of, u, err)
		}
	}
	for m, want := range map[csi.VolumeCapability_AccessMode_Mode]volume.Use{
		csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:        {SingleTarget: true},
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER: {SingleTarget: true},
		csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:  {},
		csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:   {SingleTarget: true, Access: image.Access{ReadOnly: true}},
	} {
		c := mounted("")
		c.AccessMode.Mode = m
		if u, err := useOf(c, image.Claim); err != nil || u != want {
			t.Errorf("%s: %+v: %v", m, u, err)
		}
	}
	// A class's mount option does not make a reader a writer.
	reader := mounted("")
	reader.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	reader.GetMount().MountFlags = []string{"rw"}
	if u, err := useOf(reader, image.Claim); err != nil || !u.ReadOnly {
		t.Errorf("a reader with the mount option rw: %+v: %v", u, err)
	}
}

func TestStagingRequests(t *testing.T) {
	good := &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: "/staging/", VolumeCapability: mounted("xfs")}
	if r, err := stageRequest(good); err != nil || r.ID != "v" || r.Staging != "/staging" || r.Filesystem != "xfs" {
		t.Errorf("%+v: %v", r, err)
	}
	if _, err := publishRequest(&csi.NodePublishVolumeRequest{VolumeId: "v", TargetPath: "/t", VolumeCapability: mounted("")}); code(err) != codes.FailedPrecondition ||
		!strings.Contains(err.Error(), "staging_target_path") || !strings.Contains(err.Error(), keyEphemeral) {
		t.Errorf("published without a staging path: %v", err)
	}
	r, err := publishRequest(&csi.NodePublishVolumeRequest{VolumeId: "v", TargetPath: "/t/", StagingTargetPath: "/s/", Readonly: true, VolumeCapability: device()})
	if err != nil || r.ID != "v" || r.Target != "/t" || r.Staging != "/s" || !r.TargetReadOnly || !r.Block || r.ReadOnly {
		t.Errorf("%+v: %v", r, err)
	}
}

func TestTopology(t *testing.T) {
	c := Config{NodeID: "n1"}
	at := func(nodes ...string) (ts []*csi.Topology) {
		for _, n := range nodes {
			ts = append(ts, &csi.Topology{Segments: map[string]string{TopologyKey: n}})
		}
		return ts
	}
	for name, r := range map[string]*csi.TopologyRequirement{
		"none":          nil,
		"empty":         {},
		"here":          {Requisite: at("n1")},
		"here, too":     {Requisite: at("n2", "n1"), Preferred: at("n2")},
		"preferred":     {Preferred: at("n2", "n1")},
		"what it tells": {Requisite: []*csi.Topology{c.topology()}},
	} {
		if err := c.here(r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range map[string]*csi.TopologyRequirement{
		"elsewhere":           {Requisite: at("n2", "n3")},
		"preferred elsewhere": {Preferred: at("n2")},
		"another key":         {Requisite: []*csi.Topology{{Segments: map[string]string{"zone": "n1"}}}},
	} {
		err := c.here(r)
		if code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), TopologyKey+"=n1") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTokens(t *testing.T) {
	if id, err := startingAfter(tokenAfter("pvc-1"), 3); err != nil || id != "pvc-1" {
		t.Errorf("%q: %v", id, err)
	}
	if id, err := startingAfter("", 0); err != nil || id != "" || tokenAfter("") != "" {
		t.Errorf("%q: %v", id, err)
	}
	for _, token := range []string{"invalid-token", "pvc-1", "after:", "after:../x", "7"} {
		if _, err := startingAfter(token, 0); code(err) != codes.Aborted || !strings.Contains(err.Error(), token) {
			t.Errorf("%q: %v", token, err)
		}
	}
	if _, err := startingAfter("", -1); code(err) != codes.InvalidArgument {
		t.Errorf("max_entries -1: %v", err)
	}
}
