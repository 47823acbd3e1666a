// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// unknown unpublishes and measures volumes that are not there, or not at that path.
func unknown(p *plugin) {
	t := p.t
	for name, target := range map[string]string{
		"a free target":     p.target("nothing"),
		"with a slash":      p.target("nothing") + "/",
		"an empty one left": filepath.Dir(p.target("nothing")),
	} {
		if _, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "nobody-knows", TargetPath: target}); err != nil {
			t.Errorf("unpublishing an unknown volume, %s: %v", name, err)
		}
	}
	for name, c := range map[string]struct {
		id, target string
		code       codes.Code
	}{
		"no id":         {"", p.target("v"), codes.InvalidArgument},
		"no target":     {"v", "", codes.InvalidArgument},
		"an id upwards": {"../templates", p.target("v"), codes.InvalidArgument},
	} {
		_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: c.id, TargetPath: c.target})
		t.Logf("unpublish, %s: %v", name, err)
		mustSay(t, err, c.code)
	}

	known := p.request("known", "ext4", "size", "300Mi")
	other := p.request("other", "ext4", "size", "300Mi")
	p.publish(known)
	p.publish(other)
	for name, c := range map[string]struct {
		id, path string
		code     codes.Code
	}{
		"no id":                  {"", known.TargetPath, codes.InvalidArgument},
		"no path":                {"known", "", codes.InvalidArgument},
		"an unknown volume":      {"nobody-knows", known.TargetPath, codes.NotFound},
		"a path with nothing":    {"known", p.target("nothing"), codes.NotFound},
		"a relative path":        {"known", "some/path", codes.NotFound},
		"a path outside":         {"known", "/", codes.NotFound},
		"another volume's path":  {"known", other.TargetPath, codes.NotFound},
		"a path inside a volume": {"known", filepath.Join(known.TargetPath, "lost+found"), codes.NotFound},
	} {
		_, err := p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: c.id, VolumePath: c.path})
		t.Logf("stats, %s: %v", name, err)
		mustSay(t, err, c.code)
	}
	p.unpublish(known)
	p.unpublish(other)
}

// badTargets publishes at paths that are no targets, and unpublishes there. Either leaves everything as it is.
func badTargets(p *plugin) {
	for name, target := range harnesstest.BadTargets(p.t, p.Kubelet) {
		p.t.Run(name, func(t *testing.T) {
			p := p.with(t)
			r := p.request("bad-target", "ext4", "size", "300Mi")
			r.TargetPath = target.Path
			p.refused(r, codes.InvalidArgument, "target path")
			unpublished := codes.InvalidArgument
			if target.Below {
				unpublished = codes.OK
			}
			_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "bad-target", TargetPath: target.Path})
			if t.Log(err); status.Code(err) != unpublished {
				t.Errorf("unpublish: %v, want %s", err, unpublished)
			}
		})
	}
}

// readOnlyTarget fails late: the volume has its name already when its target cannot be made.
func readOnlyTarget(p *plugin) {
	r := p.request("late", "ext4", "size", "300Mi")
	parent := filepath.Dir(r.TargetPath)
	testenv.Run(p.t, "mount", "-t", "tmpfs", "-o", "ro", "test", parent)
	p.refused(r, codes.Internal, r.TargetPath, "read-only")
	testenv.Run(p.t, "umount", parent)
	p.publish(r)
	p.unpublish(r)
}

// otherVolume publishes and unpublishes at the target of another volume.
func otherVolume(p *plugin) {
	first := p.request("first", "ext4", "size", "300Mi")
	p.publish(first)
	second := p.request("second", "ext4", "size", "300Mi")
	second.TargetPath = first.TargetPath
	p.refused(second, codes.AlreadyExists, first.TargetPath, "mount")
	p.mustKeep(func() {
		_, err := p.NodeUnpublishVolume(p.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "second", TargetPath: first.TargetPath})
		p.t.Log(err)
		mustSay(p.t, err, codes.FailedPrecondition, first.TargetPath)
	})
	p.unpublish(first)
}
