// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// TestPlugin runs the plugin on a pool of each kind, and all that leaves it
// running.
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
		if _, err := os.Lstat(filepath.Join(p.kubelet, "csi.sock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the socket is still there: %v", kind.Name, err)
		}
	}
}

// noProcessOnAHit holds the plugin against its promise that a hit starts no
// process, and shows that it would be seen if one did.
func noProcessOnAHit(p *plugin) {
	t := p.t
	idle := p.waited()
	miss := p.request("miss", "ext4", "size", "300Mi")
	p.publish(miss)
	afterMiss := p.waited()
	t.Logf("waited for (minor faults, major faults, user ticks, system ticks): at start %v, after a miss %v", idle, afterMiss)
	if afterMiss == idle {
		t.Error("a VM was waited for and nothing of it shows: this test can find nothing")
	}
	var hits []*csi.NodePublishVolumeRequest
	for i := range 4 {
		r := p.request(fmt.Sprintf("hit-%d", i), "ext4", "size", "300Mi")
		if i == 3 {
			r.VolumeContext[attrPublishAs] = "diskImage"
		}
		p.publish(r)
		if pids := p.children(); len(pids) > 0 {
			t.Errorf("hit %d: has the children %v", i, pids)
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
			p.unpublish(r) // as kubelet may
			p.unpublish(second)
		})
	}
}

func diskImage(p *plugin) {
	r := p.request("vm-disk", "ext4", "size", "300Mi", "publishAs", "diskImage")
	p.publish(r)
	p.publish(r)
	fi, err := os.Stat(filepath.Join(r.TargetPath, "disk.img"))
	if err != nil || fi.Size() != 300*mib {
		p.t.Errorf("disk.img: %v", err)
	}
	testenv.NoLoopsBelow(p.t, p.pool)
	stats, err := p.NodeGetVolumeStats(p.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: r.VolumeId, VolumePath: r.TargetPath})
	if err != nil || len(stats.GetUsage()) != 1 || stats.GetUsage()[0].Total != 300*mib {
		p.t.Errorf("stats %v: %v", stats, err)
	}
	p.unpublish(r)
}

// unknown asks for what is not there.
func unknown(p *plugin) {
	t := p.t
	file := p.target("file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"a free target":     p.target("nothing"),
		"no parent":         filepath.Join(p.kubelet, "pods", "none", "mount"),
		"a file":            file,
		"with a slash":      p.target("nothing") + "/",
		"an empty one left": filepath.Dir(p.target("nothing")),
	} {
		if _, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "nobody-knows", TargetPath: target}); err != nil {
			t.Errorf("unpublishing an unknown volume, %s: %v", name, err)
		}
	}
	if _, err := os.Lstat(file); err != nil {
		t.Errorf("unpublishing took somebody's file: %v", err)
	}
	for name, c := range map[string]struct {
		id, target string
		code       codes.Code
	}{
		"no id":                   {"", p.target("v"), codes.InvalidArgument},
		"no target":               {"v", "", codes.InvalidArgument},
		"an id upwards":           {"../templates", p.target("v"), codes.InvalidArgument},
		"a target outside":        {"v", "/var/tmp/elsewhere", codes.InvalidArgument},
		"a target outside by ..":  {"v", p.kubelet + "/../elsewhere", codes.InvalidArgument},
		"the kubelet's directory": {"v", p.kubelet, codes.InvalidArgument},
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

func badTargets(p *plugin) {
	t := p.t
	base, outside := filepath.Join(p.kubelet, "pods", "bad"), testenv.Dir(t)
	if err := errors.Join(
		os.MkdirAll(filepath.Join(base, "real"), 0o755),
		os.WriteFile(filepath.Join(base, "file"), nil, 0o644),
		os.Symlink(outside, filepath.Join(base, "link")),
		os.Symlink("real", filepath.Join(base, "inner")),
	); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"a file":               filepath.Join(base, "file"),
		"a symlink":            filepath.Join(base, "inner"),
		"a symlink outside":    filepath.Join(base, "link"),
		"below a symlink":      filepath.Join(base, "link", "mount"),
		"outside":              filepath.Join(outside, "mount"),
		"outside by dots":      p.kubelet + "/../" + filepath.Base(outside) + "/mount",
		"relative":             "pods/real/mount",
		"kubelet's directory":  p.kubelet,
		"the root directory":   "/",
		"without a parent":     filepath.Join(base, "missing", "mount"),
		"with NUL":             base + "/a\x00b",
		"a name of 300 bytes":  filepath.Join(base, strings.Repeat("n", 300)),
		"a path of 5000 bytes": filepath.Join(base, strings.Repeat("/n", 2500)),
	} {
		t.Run(name, func(t *testing.T) {
			p := p.with(t)
			r := p.request("bad-target", "ext4", "size", "300Mi")
			r.TargetPath = target
			p.refused(r, codes.InvalidArgument, "target path")
		})
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
		t.Errorf("something was made outside: %v %v", entries, err)
	}
}

// readOnlyTarget fails late: the volume has its name when its target cannot be
// made.
func readOnlyTarget(p *plugin) {
	r := p.request("late", "ext4", "size", "300Mi")
	parent := filepath.Dir(r.TargetPath)
	testenv.Run(p.t, "mount", "-t", "tmpfs", "-o", "ro", "test", parent)
	p.refused(r, codes.Internal, r.TargetPath, "read-only")
	testenv.Run(p.t, "umount", parent)
	p.publish(r)
	p.unpublish(r)
}

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

// badRequests shows that what request_test.go checks one by one is checked
// before anything is made.
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
	if fi, err := os.Lstat(filepath.Join(p.kubelet, "csi.sock")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v %v", fi.Mode(), err)
	}
}

func pages(p *plugin) {
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := p.get(path); code != 200 || body != "ok\n" {
			p.t.Errorf("%s: %d %s", path, code, body)
		}
	}
	for metric, want := range map[string]float64{
		builds: 3, // one for each filesystem
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

// logLines reads the log at its most verbose.
func logLines(p *plugin) {
	t := p.t
	r := p.request("logged", "ext4", "size", "300Mi", keyTokens, `{"":{"token":"hush-token"}}`)
	r.Secrets = map[string]string{"password": "hush-secret"}
	p.publish(r)
	p.unpublish(r)
	bad := p.request("logged-bad", "ext4", "size", "hush\n") // an attribute is no secret, and no new line either
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

// fullPool clones and formats where there is no space.
func fullPool(p *plugin) {
	t := p.t
	testenv.Fill(t, p.pool)
	var made []*csi.NodePublishVolumeRequest
	var failed error
	for i := 0; failed == nil && i < 3000; i++ { // a few blocks still fit
		r := p.request(fmt.Sprintf("more-%d", i), "ext4", "size", "300Mi")
		before := p.volumes()
		if _, failed = p.NodePublishVolume(t.Context(), r); failed == nil {
			made = append(made, r)
		} else {
			p.mustHave(before)
		}
	}
	t.Logf("cloning, after %d volumes: %v", len(made), failed)
	mustSay(t, failed, codes.ResourceExhausted, "full", "clean-all")
	p.refused(p.request("another", "ext4", "size", "320Mi"), codes.ResourceExhausted, "full")
	for _, r := range made {
		p.unpublish(r)
	}
	if err := os.Remove(filepath.Join(p.pool, "filler")); err != nil {
		t.Error(err)
	}
	again := p.request("again", "ext4", "size", "300Mi")
	p.publish(again)
	p.unpublish(again)
}

// TestInlineLimits asks for more than the flags allow.
func TestInlineLimits(t *testing.T) {
	p := newNode(t, testenv.XFS, 1<<30).start("--max-inline-size", "300Mi", "--max-inline-volumes", "2", "--max-inline-volumes-per-namespace", "1",
		"--max-template-builds-per-hour", "1")
	of := func(namespace, id, size string) *csi.NodePublishVolumeRequest {
		r := p.request(id, "ext4", "size", size)
		r.VolumeContext[keyPodNS] = namespace
		return r
	}
	p.refused(of("shop", "large", "301Mi"), codes.OutOfRange, "size", "301Mi", "300Mi", "--max-inline-size")
	p.refused(of("shop", "larger", "1Ti"), codes.OutOfRange, "size", "--max-inline-size")
	first := of("shop", "first", "300Mi")
	p.publish(first)
	p.refused(of("shop", "second", "300Mi"), codes.ResourceExhausted, "--max-inline-volumes-per-namespace 1", `"shop"`, "delete pods")
	p.refused(of("bank", "kind", "299Mi"), codes.ResourceExhausted, "--max-template-builds-per-hour 1", "try again in ")
	other := of("bank", "other", "300Mi")
	p.publish(other)
	p.refused(of("farm", "third", "300Mi"), codes.ResourceExhausted, "--max-inline-volumes 2", "has 2", `0 of them of namespace "farm"`)
	p.publish(first) // is there
	p.unpublish(first)
	third := of("farm", "third", "300Mi")
	p.publish(third)
	p.unpublish(third)
	p.unpublish(other)
}

// TestTemplateCache has a budget that no template fits into: the latest stays, and all
// volumes.
func TestTemplateCache(t *testing.T) {
	p := newNode(t, testenv.XFS, 1<<30).start("--template-cache", "1Ki")
	first, second := p.request("first", "ext4", "size", "64Mi"), p.request("second", "ext4", "size", "65Mi")
	p.publish(first)
	p.publish(second)
	templates, err := os.ReadDir(filepath.Join(p.pool, "templates"))
	if err != nil || len(templates) != 1 || !strings.HasPrefix(templates[0].Name(), "ext4-65m-") {
		t.Errorf("templates %v: %v", templates, err)
	}
	if n := p.metric("csi_disktemplate_templates_trimmed_total"); n != 1 || len(p.log.lines(`"Removed a template"`, "ext4-64m-", "--template-cache")) != 1 {
		t.Errorf("%v were trimmed: %s", n, p.log)
	}
	p.unpublish(second)
	if err := os.WriteFile(filepath.Join(first.TargetPath, "file"), nil, 0o644); err != nil {
		t.Error(err)
	}
	p.unpublish(first)
}

// mayStay are the files that a killed plugin may leave in a pool.
var mayStay = regexp.MustCompile(`^(locks/[^/]+\.lock|cache/vmlinux-[0-9a-f]{16}-[0-9a-f]{16})$`)

func TestKillDuringBuild(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	r := n.request("killed", "ext4", "size", "64Mi")
	p := n.start()
	result := make(chan error, 1)
	go func() {
		_, err := p.NodePublishVolume(t.Context(), r)
		result <- err
	}()
	vm := p.vm()
	p.kill()
	t.Logf("the caller is told: %v", <-result)
	gone(t, vm)
	for _, name := range n.files() {
		if !mayStay.MatchString(name) {
			t.Errorf("the killed plugin left %s", name)
		}
	}
	n.mustHave("none")

	p = n.start()
	p.publish(r)
	if p.metric(builds) != 1 {
		t.Error("the template was not built")
	}
	p.unpublish(r)
}

// TestWithoutFormatter restarts the plugin without what it needs to format. Its
// cache serves, and so do the volumes of the plugin before it.
func TestWithoutFormatter(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	kept := n.request("kept", "ext4", "size", "64Mi")
	p := n.start()
	p.publish(kept)
	p.kill()
	for _, missing := range []struct{ flag, package_ string }{
		{"--qemu", "qemu-system-x86"},
		{"--kernel", "--kernel"},
	} {
		t.Run("without "+missing.flag, func(t *testing.T) {
			n := n.with(t)
			p := n.start(missing.flag, "/nonexistent")
			_, err := p.Probe(t.Context(), &csi.ProbeRequest{})
			t.Log(err)
			mustSay(t, err, codes.FailedPrecondition, "/nonexistent", missing.package_)
			if code, body := p.get("/readyz"); code != 503 || !strings.Contains(body, missing.package_) {
				t.Errorf("/readyz: %d %s", code, body)
			}
			if code, _ := p.get("/healthz"); code != 200 {
				t.Errorf("/healthz: %d", code)
			}
			known := n.request("known", "ext4", "size", "64Mi")
			p.publish(known)
			if len(p.log.lines(`"NodePublishVolume"`, `volume="known"`, "templateHit=true")) != 1 {
				t.Error("not a hit")
			}
			p.refused(n.request("new", "ext4", "size", "65Mi"), codes.FailedPrecondition, "/nonexistent", missing.package_)
			p.mustKeep(func() { p.publish(kept) }) // of an earlier process
			p.unpublish(known)
			if code := p.terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
	p = n.start()
	p.unpublish(kept)
	if code := p.terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestPatience ends the caller's time in the middle of a build, asks twice for
// one volume at once, and ends the plugin's time in the middle of another build.
func TestPatience(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	p := n.start()

	r := p.request("hasty", "ext4", "size", "64Mi")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := p.NodePublishVolume(ctx, r)
	took := time.Since(start)
	t.Logf("after %s: %v", took, err)
	if c := status.Code(err); c != codes.DeadlineExceeded && c != codes.Aborted {
		t.Errorf("code %s", c)
	}
	if took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
	// The plugin's own answer, which the caller was too hasty to read. It says
	// Aborted where the caller's cancellation came before its own deadline.
	var lines []string
	p.await("the end of the call", func() bool {
		lines = p.log.lines(`] "NodePublishVolume" `, `volume="hasty"`)
		return len(lines) > 0
	})
	t.Logf("%s", lines)
	if ok, _ := regexp.MatchString(`still being built.* code="(DeadlineExceeded|Aborted)"`, lines[0]); !ok {
		t.Errorf("the plugin says %s", lines)
	}
	p.mustHave("none")
	vm := p.vm()

	// Two calls at once, for one volume: one joins the build, the other is told.
	results := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := p.NodePublishVolume(t.Context(), r)
			results <- err
		}()
	}
	first := <-results
	t.Log(first)
	mustSay(t, first, codes.Aborted, "hasty", "another operation")
	if now := p.vm(); now != vm {
		t.Errorf("the VM was %d, is %d", vm, now)
	}
	if err := <-results; err != nil {
		t.Error(err)
	}
	if b, m := p.metric(builds), p.metric(`csi_disktemplate_template_requests_total{result="miss"}`); b != 1 || m != 1 {
		t.Errorf("%v builds, %v misses", b, m)
	}
	p.unpublish(r)

	// SIGTERM in the middle of a build.
	r = p.request("drained", "ext4", "size", "65Mi")
	go func() {
		_, err := p.NodePublishVolume(t.Context(), r)
		results <- err
	}()
	p.vm()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-results; err != nil {
		t.Errorf("a call under way at SIGTERM: %v", err)
	}
	if code := p.ended(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if len(n.volumes()) == 0 || len(mountsBelow(t, n.kubelet)) != 1 {
		t.Errorf("after SIGTERM there is %s", n.volumes())
	}
	p = n.start()
	p.publish(r)
	p.unpublish(r)
}

// TestSecondPlugin starts a plugin on a pool, or at a socket, that another one has.
func TestSecondPlugin(t *testing.T) {
	n := newNode(t, testenv.XFS, 512<<20)
	p := n.start()
	link := filepath.Join(testenv.Dir(t), "link")
	if err := os.Symlink(n.pool, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pool, socket, says string }{
		{n.pool, "other.sock", "another plugin works on this pool"},
		{link, "other.sock", "another plugin works on this pool"},
		{testenv.XFS.Pool(t) + "/pool", "csi.sock", "another process serves there"},
	} {
		code, out := testenv.Product(t, "--endpoint", "unix://"+filepath.Join(n.kubelet, c.socket), "--node-id", "n", "--pool", c.pool, "--kubelet-dir", n.kubelet)
		if code != 1 || !strings.Contains(out, c.says) {
			t.Errorf("exit code %d, expected %q", code, c.says)
		}
		if holder := fmt.Sprintf("pid=%d cmd=", p.cmd.Process.Pid); c.socket == "other.sock" && !strings.Contains(out, holder) {
			t.Errorf("does not say %s", holder)
		}
	}
	if code, out := testenv.Product(t, "gc", "--pool", n.pool, "--kubelet-dir", n.kubelet); code != 1 || !strings.Contains(out, "--dry-run") {
		t.Errorf("a sweep beside a plugin: exit code %d: %s", code, out)
	}
	if code, out := testenv.Product(t, "gc", "--pool", n.pool, "--kubelet-dir", n.kubelet, "--dry-run"); code != 0 || out != "Nothing was left behind.\n" {
		t.Errorf("a plan beside a plugin: exit code %d: %s", code, out)
	}
	if _, err := p.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{}); err != nil {
		t.Errorf("the first plugin: %v", err)
	}
	p.kill() // leaves its socket
	p = n.start()
	if _, err := p.Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Error(err)
	}
}
