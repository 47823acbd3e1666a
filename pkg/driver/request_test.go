// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package driver

import (
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

const mib = diskfs.MiB

// inline is the request that kubelet makes for an inline volume.
func inline(fsType string, attributes ...string) *csi.NodePublishVolumeRequest {
	req := &csi.NodePublishVolumeRequest{
		VolumeId:         "csi-0123456789abcdef",
		TargetPath:       "/var/lib/kubelet/pods/uid/volumes/kubernetes.io~csi/scratch/mount",
		VolumeCapability: harness.Mounted(fsType),
		VolumeContext:    harness.InlineContext(harness.Pod{Namespace: "shop", Name: "web-0", UID: "uid"}, pairs(attributes)),
	}
	req.VolumeCapability.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	req.VolumeContext[kubeletPrefix+"some-key-of-the-future"] = "x"
	return req
}

// pairs makes a map of keys, each with its value after it.
func pairs(of []string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(of); i += 2 {
		m[of[i]] = of[i+1]
	}
	return m
}

func mode(m csi.VolumeCapability_AccessMode_Mode) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode.Mode = m }
}

func flags(f ...string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().MountFlags = f }
}

func TestPublishRequest(t *testing.T) {
	request := func(fs string, size int64, change func(*volume.InlineRequest)) volume.InlineRequest {
		r := volume.InlineRequest{
			ID:     "csi-0123456789abcdef",
			Target: "/var/lib/kubelet/pods/uid/volumes/kubernetes.io~csi/scratch/mount",
			Spec:   diskfs.Spec{Filesystem: fs, Size: size},
			Mode:   image.ModeFilesystem,
			Pod:    image.Pod{Namespace: "shop", Name: "web-0", UID: "uid"},
		}
		if change != nil {
			change(&r)
		}
		return r
	}
	readOnly := func(r *volume.InlineRequest) { r.ReadOnly = true }
	label := func(l string) func(*volume.InlineRequest) { return func(r *volume.InlineRequest) { r.Spec.Label = l } }
	lineage := func(l image.Lineage) func(*volume.InlineRequest) {
		return func(r *volume.InlineRequest) { r.Lineage = l }
	}
	content := func(c string) func(*volume.InlineRequest) {
		return func(r *volume.InlineRequest) { r.Spec.Content = c }
	}
	for name, c := range map[string]struct {
		req    *csi.NodePublishVolumeRequest
		change func(*csi.NodePublishVolumeRequest)
		want   volume.InlineRequest
	}{
		"nothing said":                 {req: inline(""), want: request("ext4", 256*mib, nil)},
		"ext4's default size":          {req: inline("ext4"), want: request("ext4", 256*mib, nil)},
		"btrfs' default size":          {req: inline("btrfs"), want: request("btrfs", 256*mib, nil)},
		"xfs' default is its minimum":  {req: inline("xfs"), want: request("xfs", 300*mib, nil)},
		"binary unit":                  {req: inline("xfs", "size", "1Gi"), want: request("xfs", 1024*mib, nil)},
		"decimal unit, rounded up":     {req: inline("ext4", "size", "1500M"), want: request("ext4", 1431*mib, nil)},
		"plain bytes, rounded up":      {req: inline("ext4", "size", "67108865"), want: request("ext4", 65*mib, nil)},
		"a fraction of a unit":         {req: inline("ext4", "size", "0.5Gi"), want: request("ext4", 512*mib, nil)},
		"a fraction of a byte":         {req: inline("ext4", "size", "67108864.5"), want: request("ext4", 65*mib, nil)},
		"with exponent":                {req: inline("ext4", "size", "1e9"), want: request("ext4", 954*mib, nil)},
		"rounding reaches the minimum": {req: inline("ext4", "size", "8388609"), want: request("ext4", 9*mib, nil)},
		"ext4's minimum":               {req: inline("ext4", "size", "9Mi"), want: request("ext4", 9*mib, nil)},
		"btrfs' minimum":               {req: inline("btrfs", "size", "109Mi"), want: request("btrfs", 109*mib, nil)},
		"the maximum":                  {req: inline("xfs", "size", "4294967295Mi"), want: request("xfs", diskfs.MaxSize, nil)},
		"rounded up to the maximum":    {req: inline("xfs", "size", "4503599626321919"), want: request("xfs", diskfs.MaxSize, nil)},
		"label":                        {req: inline("ext4", "label", "data_1.x-Y"), want: request("ext4", 256*mib, label("data_1.x-Y"))},
		"longest label of ext4":        {req: inline("ext4", "label", strings.Repeat("l", 16)), want: request("ext4", 256*mib, label(strings.Repeat("l", 16)))},
		"longest label of xfs":         {req: inline("xfs", "label", strings.Repeat("l", 12)), want: request("xfs", 300*mib, label(strings.Repeat("l", 12)))},
		"longest label of btrfs":       {req: inline("btrfs", "label", strings.Repeat("l", 255)), want: request("btrfs", 256*mib, label(strings.Repeat("l", 255)))},
		"empty label":                  {req: inline("ext4", "label", ""), want: request("ext4", 256*mib, nil)},
		"published as filesystem":      {req: inline("ext4", "publishAs", "filesystem"), want: request("ext4", 256*mib, nil)},
		"published as disk image": {req: inline("ext4", "publishAs", "diskImage"),
			want: request("ext4", 256*mib, func(r *volume.InlineRequest) { r.Mode = image.ModeDiskImage })},
		"volatile": {req: inline("ext4", "durability", "volatile"),
			want: request("ext4", 256*mib, func(r *volume.InlineRequest) { r.Durability = image.Volatile })},
		"synced disk image": {req: inline("ext4", "durability", "synced", "publishAs", "diskImage"),
			want: request("ext4", 256*mib, func(r *volume.InlineRequest) { r.Durability, r.Mode = image.Synced, image.ModeDiskImage })},
		"from a golden": {req: inline("", "from", "golden/go-cache"), want: request("", 0, lineage(image.Lineage{From: "golden/go-cache"}))},
		"from several": {req: inline("xfs", "from", "golden/pr-1", "orElse", "golden/main,shared/main,content/pg", "size", "1Gi"),
			want: request("xfs", 1024*mib, lineage(image.Lineage{From: "golden/pr-1", OrElse: "golden/main,shared/main,content/pg"}))},
		"commits": {req: inline("ext4", "commitTo", "go-cache", "commitWhen", "always", "size", "1Gi"),
			want: request("ext4", 1024*mib, lineage(image.Lineage{CommitTo: "go-cache", CommitWhen: image.CommitAlways}))},
		"commits to a shared one": {req: inline("ext4", "commitTo", "shared/main", "size", "1Gi"),
			want: request("ext4", 1024*mib, lineage(image.Lineage{CommitTo: "shared/main"}))},
		"with a content":         {req: inline("", "content", "postgres-16"), want: request("", 0, content("postgres-16"))},
		"with a content, on xfs": {req: inline("xfs", "content", "postgres-16", "size", "1Gi"), want: request("xfs", 1024*mib, content("postgres-16"))},
		"slash after the target": {req: inline(""), want: request("ext4", 256*mib, nil),
			change: func(r *csi.NodePublishVolumeRequest) { r.TargetPath += "/" }},
		"longest volume id": {req: inline(""), want: request("ext4", 256*mib, func(r *volume.InlineRequest) { r.ID = strings.Repeat("v", 128) }),
			change: func(r *csi.NodePublishVolumeRequest) { r.VolumeId = strings.Repeat("v", 128) }},
		"read-only volume": {req: inline(""), want: request("ext4", 256*mib, readOnly),
			change: func(r *csi.NodePublishVolumeRequest) { r.Readonly = true }},
		"read-only mode":  {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY), want: request("ext4", 256*mib, readOnly)},
		"single writer":   {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER), want: request("ext4", 256*mib, nil)},
		"several writers": {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER), want: request("ext4", 256*mib, nil)},
		"read-only flag":  {req: inline(""), change: flags("ro"), want: request("ext4", 256*mib, readOnly)},
		"noatime flag":    {req: inline(""), change: flags("noatime"), want: request("ext4", 256*mib, func(r *volume.InlineRequest) { r.NoATime = true })},
		"idle flags":      {req: inline(""), change: flags("rw", "nosuid", "nodev", "relatime"), want: request("ext4", 256*mib, nil)},
	} {
		t.Run(name, func(t *testing.T) {
			if c.change != nil {
				c.change(c.req)
			}
			got, err := inlineRequest(c.req)
			if err != nil {
				t.Fatal(err)
			}
			if !got.Spec.Equal(c.want.Spec) {
				t.Errorf("asks for %s, not %s", got.Spec, c.want.Spec)
			}
			got.Spec, c.want.Spec = diskfs.Spec{}, diskfs.Spec{}
			if got.ID != c.want.ID || got.Target != c.want.Target || got.Mode != c.want.Mode ||
				got.Durability != c.want.Durability ||
				got.ReadOnly != c.want.ReadOnly || got.NoATime != c.want.NoATime || got.Pod != c.want.Pod {
				t.Errorf("is  %+v\nnot %+v", got, c.want)
			}
		})
	}
}

// TestBadPublishRequest reads the messages as the author of a pod would: what is wrong, what was given, what is allowed.
func TestBadPublishRequest(t *testing.T) {
	const (
		maxBytes    = "4294967295Mi" // u32 MiB
		ext4Max     = "8Ti"          // 8 TiB
		ext4Min     = "9Mi"
		btrfsMin    = "109Mi"
		xfsMin      = "300Mi"
		allowed     = "size, label, content, publishAs, durability, from, orElse, commitTo, commitWhen"
		filesystems = "btrfs, ext4, xfs"
		anID        = "letters, digits, '.', '_' or '-'"
	)
	id := func(id string) func(*csi.NodePublishVolumeRequest) {
		return func(r *csi.NodePublishVolumeRequest) { r.VolumeId = id }
	}
	bad, outside := codes.InvalidArgument, codes.OutOfRange
	for name, c := range map[string]struct {
		req    *csi.NodePublishVolumeRequest
		change func(*csi.NodePublishVolumeRequest)
		code   codes.Code
		says   []string
	}{
		"unknown attribute":      {req: inline("", "siez", "1Gi"), code: bad, says: []string{"attribute", `"siez"`, "did you mean size?", allowed}},
		"attribute in the plain": {req: inline("", "fsType", "xfs"), code: bad, says: []string{`"fsType"`, "beside volumeAttributes"}},
		"attribute by case":      {req: inline("", "Size", "1Gi"), code: bad, says: []string{`"Size"`, allowed}},
		"unknown filesystem":     {req: inline("ntfs"), code: bad, says: []string{"fsType", `"ntfs"`, filesystems}},
		"filesystem by case":     {req: inline("EXT4"), code: bad, says: []string{"fsType", `"EXT4"`, filesystems}},
		"raw":                    {req: inline("raw"), code: bad, says: []string{"fsType", `"raw"`, filesystems}},

		"size zero":           {req: inline("ext4", "size", "0"), code: outside, says: []string{"size", `"0"`, ext4Min, ext4Max}},
		"size negative":       {req: inline("ext4", "size", "-1Gi"), code: outside, says: []string{"size", `"-1Gi"`, ext4Min, ext4Max}},
		"size in halves":      {req: inline("ext4", "size", "0.5"), code: outside, says: []string{"size", `"0.5"`, ext4Min, ext4Max}},
		"ext4 too small":      {req: inline("ext4", "size", "8Mi"), code: outside, says: []string{"size", `"8Mi"`, "ext4", ext4Min, ext4Max}},
		"btrfs too small":     {req: inline("btrfs", "size", "108Mi"), code: outside, says: []string{"size", `"108Mi"`, "btrfs", btrfsMin, maxBytes}},
		"xfs too small":       {req: inline("xfs", "size", "299Mi"), code: outside, says: []string{"size", `"299Mi"`, "xfs", xfsMin, maxBytes}},
		"above u32 MiB":       {req: inline("xfs", "size", "4294967296Mi"), code: outside, says: []string{"size", `"4294967296Mi"`, xfsMin, maxBytes}},
		"one byte above":      {req: inline("xfs", "size", "4503599626321921"), code: outside, says: []string{"size", `"4503599626321921"`, xfsMin, maxBytes}},
		"a fraction above":    {req: inline("xfs", "size", "4503599626321920.5"), code: outside, says: []string{"size", xfsMin, maxBytes}},
		"the largest int64":   {req: inline("ext4", "size", "9223372036854775807"), code: outside, says: []string{"size", ext4Min, ext4Max}},
		"above every int64":   {req: inline("ext4", "size", "1e30"), code: outside, says: []string{"size", `"1e30"`, ext4Min, ext4Max}},
		"2^64 and a GiB":      {req: inline("ext4", "size", "18446744074783293440"), code: outside, says: []string{"size", `"18446744074783293440"`, ext4Min, ext4Max}},
		"-2^64 and a GiB":     {req: inline("ext4", "size", "-18446744072635809792"), code: outside, says: []string{"size", `"-18446744072635809792"`, ext4Min, ext4Max}},
		"below every int64":   {req: inline("ext4", "size", "-1e30"), code: outside, says: []string{"size", `"-1e30"`, ext4Min, ext4Max}},
		"size empty":          {req: inline("ext4", "size", ""), code: bad, says: []string{"size", `""`, "quantity", "512Mi"}},
		"size in words":       {req: inline("ext4", "size", "lots"), code: bad, says: []string{"size", `"lots"`, "quantity", "512Mi"}},
		"size with MB":        {req: inline("ext4", "size", "10MB"), code: bad, says: []string{"size", `"10MB"`, "quantity", "512Mi", "did you mean 10M (10,000,000 bytes) or 10Mi"}},
		"size in hexadecimal": {req: inline("ext4", "size", "0x100000"), code: bad, says: []string{"size", `"0x100000"`, "quantity"}},
		"size after a space":  {req: inline("ext4", "size", " 1Gi"), code: bad, says: []string{"size", `" 1Gi"`, "quantity"}},
		"size not a number":   {req: inline("ext4", "size", "NaN"), code: bad, says: []string{"size", `"NaN"`, "quantity"}},
		"size of many digits": {req: inline("ext4", "size", strings.Repeat("9", 400)), code: outside, says: []string{"size", ext4Min, ext4Max}},
		// Computing these would take longer than anybody waits.
		"size to the skies":    {req: inline("ext4", "size", "1e999999999"), code: bad, says: []string{"size", `"1e999999999"`, "quantity", "512Mi"}},
		"size to nothing":      {req: inline("ext4", "size", "1e-999999999"), code: bad, says: []string{"size", `"1e-999999999"`, "quantity", "512Mi"}},
		"label too long, ext4": {req: inline("ext4", "label", strings.Repeat("l", 17)), code: bad, says: []string{"label", "lllll", "17", "16"}},
		"label too long, xfs":  {req: inline("xfs", "label", strings.Repeat("l", 13)), code: bad, says: []string{"label", "lllll", "13", "12"}},
		"label as an option":   {req: inline("ext4", "label", "-F"), code: bad, says: []string{"label", `"-F"`, "letters"}},
		"label with a space":   {req: inline("ext4", "label", "a b"), code: bad, says: []string{"label", `"a b"`, "letters"}},
		"label with NUL":       {req: inline("ext4", "label", "a\x00b"), code: bad, says: []string{"label", `"a\x00b"`, "letters"}},
		"label not ASCII":      {req: inline("ext4", "label", "ä"), code: bad, says: []string{"label", `"ä"`, "letters"}},
		"label with a line":    {req: inline("ext4", "label", "a\nb"), code: bad, says: []string{"label", `"a\nb"`, "letters"}},
		"durability in words":  {req: inline("", "durability", "high"), code: bad, says: []string{"durability", `"high"`, "synced, volatile"}},
		"durability empty":     {req: inline("", "durability", ""), code: bad, says: []string{"durability", `""`, "synced, volatile"}},
		"durability by case":   {req: inline("", "durability", "Volatile"), code: bad, says: []string{"durability", `"Volatile"`, "synced, volatile"}},
		"durability too long":  {req: inline("", "durability", strings.Repeat("v", 4096)), code: bad, says: []string{"durability", "vvv", "synced, volatile"}},
		"volatile disk image": {req: inline("", "durability", "volatile", "publishAs", "diskImage"), code: bad,
			says: []string{"durability", `"volatile"`, "publishAs", "diskImage", "filesystem", "leave durability out"}},
		"published as block":   {req: inline("", "publishAs", "block"), code: bad, says: []string{"publishAs", `"block"`, "filesystem, diskImage"}},
		"published as nothing": {req: inline("", "publishAs", ""), code: bad, says: []string{"publishAs", `""`, "filesystem, diskImage"}},
		"published by case":    {req: inline("", "publishAs", "diskimage"), code: bad, says: []string{"publishAs", `"diskimage"`, "filesystem, diskImage"}},

		"from nothing":   {req: inline("", "from", ""), code: bad, says: []string{"volume attribute from", "empty", "leave it out"}},
		"from a content": {req: inline("", "from", "content/pg"), code: bad, says: []string{"volume attribute from", `"content/pg"`, "golden/NAME or shared/NAME"}},
		"from upwards":   {req: inline("", "from", "golden/../x"), code: bad, says: []string{"from", `"golden/../x"`, "lower-case letters"}},
		"orElse alone":   {req: inline("", "orElse", "content/pg"), code: bad, says: []string{"orElse", `"content/pg"`, "from"}},
		"orElse wrong":   {req: inline("", "from", "golden/x", "orElse", "pg"), code: bad, says: []string{"orElse", `"pg"`, "content/NAME"}},
		"orElse after a content": {req: inline("", "from", "golden/x", "orElse", "content/pg,golden/y"), code: bad,
			says: []string{"orElse", "nothing is tried after a content", "put it last"}},
		"from and content":   {req: inline("", "from", "golden/x", "content", "pg"), code: bad, says: []string{"content", `"pg"`, "set orElse to content/pg"}},
		"commitTo upwards":   {req: inline("", "commitTo", "../x"), code: bad, says: []string{"commitTo", `"../x"`, "shared/NAME"}},
		"commitTo elsewhere": {req: inline("", "commitTo", "other/x"), code: bad, says: []string{"commitTo", `"other/x"`, "shared/NAME"}},
		"commitWhen alone":   {req: inline("", "commitWhen", "always"), code: bad, says: []string{"commitWhen", `"always"`, "commitTo"}},
		"commitWhen wrong":   {req: inline("", "commitTo", "x", "commitWhen", "never"), code: bad, says: []string{"commitWhen", `"never"`, "marked, always"}},
		"commits a disk": {req: inline("", "commitTo", "x", "publishAs", "diskImage"), code: bad,
			says: []string{"commitTo", `"x"`, "diskImage", "mounted filesystems"}},
		"content empty":      {req: inline("", "content", ""), code: bad, says: []string{"content", "empty", "leave it out"}},
		"content upwards":    {req: inline("", "content", "../pg"), code: bad, says: []string{"content", `"../pg"`, "lower case letters"}},
		"content by case":    {req: inline("", "content", "Postgres"), code: bad, says: []string{"content", `"Postgres"`, "lower case letters"}},
		"content with NUL":   {req: inline("", "content", "a\x00"), code: bad, says: []string{"content", `"a\x00"`, "lower case letters"}},
		"content too long":   {req: inline("", "content", strings.Repeat("c", 64)), code: bad, says: []string{"content", "ccc", "63"}},
		"content, too small": {req: inline("ext4", "content", "c", "size", "8Mi"), code: outside, says: []string{"size", `"8Mi"`, ext4Min}},

		"no volume id":           {req: inline(""), change: id(""), code: bad, says: []string{"volume_id", "empty"}},
		"volume id with a slash": {req: inline(""), change: id("a/b"), code: bad, says: []string{"volume_id", `"a/b"`, anID}},
		"volume id upwards":      {req: inline(""), change: id(".."), code: bad, says: []string{"volume_id", `".."`, anID}},
		"volume id here":         {req: inline(""), change: id("."), code: bad, says: []string{"volume_id", `"."`, anID}},
		"volume id with NUL":     {req: inline(""), change: id("a\x00b"), code: bad, says: []string{"volume_id", `"a\x00b"`, anID}},
		"volume id with a line":  {req: inline(""), change: id("a\n"), code: bad, says: []string{"volume_id", `"a\n"`, anID}},
		"volume id as an option": {req: inline(""), change: id("-a"), code: bad, says: []string{"volume_id", `"-a"`, anID}},
		"volume id not ASCII":    {req: inline(""), change: id("ä"), code: bad, says: []string{"volume_id", `"ä"`, anID}},
		"volume id of 129 bytes": {req: inline(""), change: id(strings.Repeat("v", 129)), code: bad, says: []string{"volume_id", "vvv", "129", "128"}},
		"volume id of 300 bytes": {req: inline(""), change: id(strings.Repeat("v", 300)), code: bad, says: []string{"volume_id", "vvv", "300", "128"}},

		"no target": {req: inline(""), code: bad, says: []string{"target_path", "empty"},
			change: func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "" }},
		"no capability": {req: inline(""), code: bad, says: []string{"volume_capability", "empty"},
			change: func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }},
		"no access type": {req: inline(""), code: bad, says: []string{"access_type", "block or mount"},
			change: func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessType = nil }},
		"block": {req: inline(""), code: bad, says: []string{"access_type", "mount"},
			change: func(r *csi.NodePublishVolumeRequest) {
				r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
			}},
		"no access mode": {req: inline(""), code: bad, says: []string{"accessModes", "UNKNOWN", "ReadWriteOncePod"},
			change: func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode = nil }},
		"read on many nodes":  {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY), code: bad, says: []string{"accessModes", "MULTI_NODE_READER_ONLY", "ReadWriteOncePod"}},
		"write on one node":   {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER), code: bad, says: []string{"accessModes", "MULTI_NODE_SINGLE_WRITER", "ReadWriteOncePod"}},
		"write on many nodes": {req: inline(""), change: mode(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), code: bad, says: []string{"accessModes", "MULTI_NODE_MULTI_WRITER", "ReadWriteOncePod"}},
		"a mode of tomorrow":  {req: inline(""), change: mode(99), code: bad, says: []string{"accessModes", "99", "ReadWriteOncePod"}},
		"staged": {req: inline(""), code: bad, says: []string{"staging_target_path", `"/staging"`, "empty"},
			change: func(r *csi.NodePublishVolumeRequest) { r.StagingTargetPath = "/staging" }},
		"mount flag suid":          {req: inline(""), change: flags("suid"), code: bad, says: []string{"mountOptions", `"suid"`, "noatime"}},
		"mount flag of ext4":       {req: inline(""), change: flags("noatime", "data=journal"), code: bad, says: []string{"mountOptions", `"data=journal"`, "noatime"}},
		"mount flags in one":       {req: inline(""), change: flags("ro,suid"), code: bad, says: []string{"mountOptions", `"ro,suid"`, "noatime"}},
		"mount flag that is empty": {req: inline(""), change: flags(""), code: bad, says: []string{"mountOptions", `""`, "noatime"}},
	} {
		t.Run(name, func(t *testing.T) {
			if c.change != nil {
				c.change(c.req)
			}
			_, err := inlineRequest(c.req)
			t.Log(err)
			mustSay(t, toStatus(err), c.code, c.says...)
		})
	}
	if _, err := inlineRequest(nil); status.Code(toStatus(err)) != bad {
		t.Errorf("an empty request: %v", err)
	}
}
