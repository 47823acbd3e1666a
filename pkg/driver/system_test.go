// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// TestPlugin runs the plugin on a pool of each kind, and all tests that leave it running.
func TestPlugin(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		p := newNode(t, kind, 1<<30).start()
		t.Run(kind.Name, func(t *testing.T) {
			for _, test := range []struct {
				name string
				run  func(*plugin)
			}{
				{"no process on a hit", noProcessOnAHit}, // first: it needs a miss
				{"life of a volume", lifeOfAVolume},
				{"disk image", diskImage},
				{"unknown", unknown},
				{"bad targets", badTargets},
				{"read-only target", readOnlyTarget},
				{"other volume at the target", otherVolume},
				{"bad requests", badRequests},
				{"identity", identity},
				{"HTTP", pages},
				{"log", logLines},
				{"full pool", fullPool},
			} {
				t.Run(test.name, func(t *testing.T) {
					p := p.with(t)
					p.mustKeep(func() { test.run(p) })
				})
			}
		})
		if code := p.terminate(); code != 0 {
			t.Errorf("%s: exit code %d after SIGTERM", kind.Name, code)
		}
		if _, err := os.Lstat(p.Socket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the socket is still there: %v", kind.Name, err)
		}
	}
}

// noProcessOnAHit checks that a hit starts no process, and that it would see one if it did.
func noProcessOnAHit(p *plugin) {
	t := p.t
	idle := p.waited()
	miss := p.request("miss", "ext4", "size", "300Mi")
	p.publish(miss)
	afterMiss := p.waited()
	t.Logf("waited for (minor faults, major faults, user ticks, system ticks): at start %v, after a miss %v", idle, afterMiss)
	if afterMiss == idle {
		t.Error("the plugin waited for a VM and the sums do not show it: this test cannot find a process")
	}
	var hits []*csi.NodePublishVolumeRequest
	for i := range 4 {
		r := p.request(fmt.Sprintf("hit-%d", i), "ext4", "size", "300Mi")
		if i == 3 {
			r.VolumeContext[attrPublishAs] = "diskImage"
		}
		p.publish(r)
		if pids := p.children(); len(pids) > 0 {
			t.Errorf("hit %d: the plugin has the children %v", i, pids)
		}
		hits = append(hits, r)
	}
	if n := len(p.log.lines(`"NodePublishVolume"`, `volume="hit-`, "templateHit=true")); n != len(hits) {
		t.Errorf("%d of %d were hits", n, len(hits))
	}
	for _, r := range append(hits, miss) {
		p.unpublish(r)
	}
	if after := p.waited(); after != afterMiss {
		t.Errorf("hits and unpublishing started processes: %v, then %v", afterMiss, after)
	}
}

// lifeOfAVolume publishes and unpublishes inline volumes, and repeats both.
func lifeOfAVolume(p *plugin) {
	for _, fs := range diskfs.Names() {
		p.t.Run(fs, func(t *testing.T) {
			p := p.with(t)
			r := p.request("first-"+fs, fs, "size", "300Mi", "label", "")
			p.publish(r)
			if err := os.WriteFile(filepath.Join(r.TargetPath, "file"), []byte("kept"), 0o644); err != nil {
				t.Error(err)
			}
			p.mustKeep(func() { p.publish(r) })
			if n := len(p.log.lines(`"NodePublishVolume"`, r.VolumeId, "existed=true")); n != 1 {
				t.Errorf("%d lines of the log say that it existed", n)
			}
			second := p.request("second-"+fs, fs, "size", "300Mi")
			p.publish(second)
			if n := len(p.log.lines(`"NodePublishVolume"`, second.VolumeId, "templateHit=true")); n != 1 {
				t.Errorf("the second volume is not a hit: %q", p.log.lines(second.VolumeId))
			}
			if b, err := os.ReadFile(filepath.Join(r.TargetPath, "file")); err != nil || string(b) != "kept" {
				t.Errorf("the first has %q: %v", b, err)
			}
			if _, err := os.Lstat(filepath.Join(second.TargetPath, "file")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the second has the first's file: %v", err)
			}
			stats, err := p.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: r.VolumeId, VolumePath: r.TargetPath})
			if err != nil {
				t.Fatal(err)
			}
			seen := map[csi.VolumeUsage_Unit]bool{}
			for _, u := range stats.GetUsage() {
				seen[u.Unit] = true
				if u.Total <= 0 || u.Total > 300*mib || u.Available <= 0 || u.Used+u.Available > u.Total {
					t.Errorf("usage %v", u)
				}
			}
			if !seen[csi.VolumeUsage_BYTES] || seen[csi.VolumeUsage_INODES] != (fs != "btrfs") {
				t.Errorf("usage %v", stats)
			}

			different := p.request(r.VolumeId, fs, "size", "301Mi")
			p.refused(different, codes.AlreadyExists, "300Mi", "301Mi", "unpublish")
			elsewhere := p.request(r.VolumeId, fs, "size", "300Mi")
			elsewhere.TargetPath = p.target("elsewhere")
			p.refused(elsewhere, codes.FailedPrecondition, r.TargetPath, elsewhere.TargetPath)

			p.unpublish(r)
			p.unpublish(r) // kubelet may repeat it
			p.unpublish(second)
		})
	}
}

// diskImage publishes a volume as the file disk.img.
func diskImage(p *plugin) {
	r := p.request("vm-disk", "ext4", "size", "300Mi", "publishAs", "diskImage")
	p.publish(r)
	p.publish(r)
	fi, err := os.Stat(filepath.Join(r.TargetPath, "disk.img"))
	if err != nil || fi.Size() != 300*mib {
		p.t.Errorf("disk.img: %v", err)
	}
	testenv.Eventually(p.t, "the loop devices of volumes to go", func() bool { return len(p.find().Loops) == 0 })
	stats, err := p.NodeGetVolumeStats(p.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: r.VolumeId, VolumePath: r.TargetPath})
	if err != nil || len(stats.GetUsage()) != 1 || stats.GetUsage()[0].Total != 300*mib {
		p.t.Errorf("stats %v: %v", stats, err)
	}
	p.unpublish(r)
}

// badRequests shows that the checks of request_test.go come before anything is made.
func badRequests(p *plugin) {
	before := len(p.files())
	upwards := p.request("up", "ext4")
	upwards.VolumeId = "../templates/up"
	p.refused(upwards, codes.InvalidArgument, "volume_id", `"../templates/up"`)
	p.refused(p.request("size", "xfs", "size", "1Mi"), codes.OutOfRange, "size", `"1Mi"`, "300Mi", "4294967295Mi")
	p.refused(p.request("attribute", "xfs", "color", "red"), codes.InvalidArgument, `"color"`, "size")
	p.refused(p.request("fs", "reiserfs"), codes.InvalidArgument, `"reiserfs"`, "btrfs, ext4, xfs")
	if after := len(p.files()); after != before {
		p.t.Errorf("%d files in the pool became %d", before, after)
	}
}

// identity asks who the plugin and the node are.
func identity(p *plugin) {
	t := p.t
	info, err := p.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	if err != nil || info.GetName() != DefaultName || info.GetVendorVersion() == "" {
		t.Errorf("plugin %v: %v", info, err)
	}
	node, err := p.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	if err != nil || node.GetNodeId() != "node-of-test" || node.GetAccessibleTopology().GetSegments()[TopologyKey] != "node-of-test" {
		t.Errorf("node %v: %v", node, err)
	}
	if probe, err := p.Probe(t.Context(), &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe %v: %v", probe, err)
	}
	if fi, err := os.Lstat(p.Socket()); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v %v", fi.Mode(), err)
	}
}

// pages reads the pages of the HTTP endpoint. It comes after the calls that it expects to be counted.
func pages(p *plugin) {
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := p.get(path); code != 200 || body != "ok\n" {
			p.t.Errorf("%s: %d %s", path, code, body)
		}
	}
	for metric, want := range map[string]float64{
		builds: 3, // one per filesystem
		`csi_disktemplate_template_build_duration_seconds_count{filesystem="xfs",result="ok"}`: 1,
		`csi_disktemplate_template_requests_total{result="miss"}`:                              3,
		`csi_disktemplate_formatter_accelerator_info{accelerator="tcg"}`:                       1,
	} {
		if got := p.metric(metric); got != want {
			p.t.Errorf("%s is %v, not %v", metric, got, want)
		}
	}
	size, available := p.metric("csi_disktemplate_pool_size_bytes"), p.metric("csi_disktemplate_pool_available_bytes")
	if size < 512*mib || size > 1024*mib || available <= 0 || available >= size {
		p.t.Errorf("the pool has %v bytes, %v available", size, available)
	}
	if p.metric("csi_disktemplate_operation_duration_seconds_count") < 10 || p.metric("process_start_time_seconds") == 0 {
		p.t.Error("calls are not counted")
	}
}

// logLines reads the most verbose log.
func logLines(p *plugin) {
	t := p.t
	r := p.request("logged", "ext4", "size", "300Mi", keyTokens, `{"":{"token":"hush-token"}}`)
	r.Secrets = map[string]string{"password": "hush-secret"}
	p.publish(r)
	p.unpublish(r)
	bad := p.request("logged-bad", "ext4", "size", "hush\n") // an attribute is not a secret, but it must not start a new line
	p.refused(bad, codes.InvalidArgument)
	for _, c := range []struct {
		method, id string
		wants      []string
	}{
		{"NodePublishVolume", "logged", []string{`pod="shop/pod-of-logged"`, "duration=", `template="ext4-300m-`, "templateHit=true", `code="OK"`, r.TargetPath}},
		{"NodeUnpublishVolume", "logged", []string{"duration=", `code="OK"`, r.TargetPath}},
		{"NodePublishVolume", "logged-bad", []string{`pod="shop/pod-of-logged-bad"`, "duration=", `code="InvalidArgument"`, `hush\\n`}},
	} {
		lines := p.log.lines(fmt.Sprintf("] %q ", c.method), fmt.Sprintf("volume=%q ", c.id))
		t.Logf("%s", lines)
		if len(lines) != 1 {
			t.Errorf("%d lines for %s of %s", len(lines), c.method, c.id)
			continue
		}
		for _, want := range c.wants {
			if !strings.Contains(lines[0], want) {
				t.Errorf("%s of %s: no %s in %s", c.method, c.id, want, lines[0])
			}
		}
	}
	if len(p.log.lines(`"Request"`, `method="NodePublishVolume"`)) == 0 {
		t.Error("-v 5 does not log requests")
	}
	if strings.Contains(p.log.String(), "hush-") {
		t.Errorf("secrets are logged: %s", p.log.lines("hush-"))
	}
}
