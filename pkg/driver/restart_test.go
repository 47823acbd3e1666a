// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
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
)

// mayStay matches the files that a killed plugin may leave in a pool.
var mayStay = regexp.MustCompile(`^(admin\.sock|locks/[^/]+\.lock|cache/vmlinux-[0-9a-f]{16}-[0-9a-f]{16})$`)

// TestKillDuringBuild kills the plugin while a VM formats a template.
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
	p.Kill()
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

// TestWithoutFormatter restarts the plugin without QEMU, and without a kernel. Cached templates still serve, and so do the
// volumes of the plugin before it.
func TestWithoutFormatter(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	kept := n.request("kept", "ext4", "size", "64Mi")
	p := n.start()
	p.publish(kept)
	p.Kill()
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
			p.mustKeep(func() { p.publish(kept) }) // an earlier process published it
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

// TestPatience lets a caller's deadline pass during a build, asks twice at once for one volume, and sends SIGTERM during
// another build.
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
	// The log has the plugin's own answer, which the caller did not wait for. The code is Aborted if the caller's
	// cancellation arrived before the plugin's own deadline.
	var lines []string
	p.await("the end of the call", func() bool {
		lines = p.log.lines(`] "NodePublishVolume" `, `volume="hasty"`)
		return len(lines) > 0
	})
	t.Logf("%s", lines)
	if ok, _ := regexp.MatchString(`template ext4 64Mi is being built.* code="(DeadlineExceeded|Aborted)"`, lines[0]); !ok {
		t.Errorf("the plugin says %s", lines)
	}
	p.mustHave("none")
	vm := p.vm()

	// Two calls at once for one volume: one joins the build, the other gets Aborted.
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

	// A caller reads what it waits for before its deadline, and for how long, since one build was seen.
	r = p.request("comes-back", "ext4", "size", "65Mi")
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = p.NodePublishVolume(ctx, r)
	t.Log(err)
	mustSay(t, err, codes.Aborted, "template ext4 65Mi is being built (about ", "Kubernetes will ask again")

	// A caller that comes back when the template is there has waited for it all the same.
	p.await("the end of the build", func() bool { return p.metric(builds) == 2 })
	p.publish(r)
	p.unpublish(r)
	if m, h := p.metric(`csi_disktemplate_template_requests_total{result="miss"}`), p.metric(`csi_disktemplate_template_requests_total{result="hit"}`); m != 2 || h != 0 {
		t.Errorf("%v misses, %v hits", m, h)
	}

	// SIGTERM in the middle of a build.
	r = p.request("drained", "ext4", "size", "66Mi")
	go func() {
		_, err := p.NodePublishVolume(t.Context(), r)
		results <- err
	}()
	p.vm()
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-results; err != nil {
		t.Errorf("a call under way at SIGTERM: %v", err)
	}
	if code := p.ended(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if len(n.volumes()) == 0 || len(n.mounts()) != 1 {
		t.Errorf("after SIGTERM there is %s", n.volumes())
	}
	p = n.start()
	p.publish(r)
	p.unpublish(r)
}

// TestSecondPlugin starts a plugin on a pool, or at a socket, that another plugin uses.
func TestSecondPlugin(t *testing.T) {
	n := newNode(t, testenv.XFS, 512<<20)
	p := n.start()
	link := filepath.Join(testenv.Dir(t), "link")
	if err := os.Symlink(n.Pool, link); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(n.Kubelet, "other.sock")
	for _, c := range []struct{ pool, socket, says string }{
		{n.Pool, other, "another plugin works on this pool"},
		{link, other, "another plugin works on this pool"},
		{testenv.XFS.Pool(t) + "/pool", n.Socket(), "another process serves there"},
	} {
		code, out := testenv.Product(t, "--endpoint", "unix://"+c.socket, "--node-id", "n", "--pool", c.pool, "--kubelet-dir", n.Kubelet)
		if code != 1 || !strings.Contains(out, c.says) {
			t.Errorf("exit code %d, expected %q", code, c.says)
		}
		if holder := fmt.Sprintf("pid=%d cmd=", p.PID()); c.socket == other && !strings.Contains(out, holder) {
			t.Errorf("does not say %s", holder)
		}
	}
	if code, out := testenv.Product(t, "gc", "--pool", n.Pool, "--kubelet-dir", n.Kubelet); code != 1 || !strings.Contains(out, "--dry-run") {
		t.Errorf("a sweep beside a plugin: exit code %d: %s", code, out)
	}
	if code, out := testenv.Product(t, "gc", "--pool", n.Pool, "--kubelet-dir", n.Kubelet, "--dry-run"); code != 0 || out != "Nothing was left behind.\n" {
		t.Errorf("a plan beside a plugin: exit code %d: %s", code, out)
	}
	if _, err := p.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{}); err != nil {
		t.Errorf("the first plugin: %v", err)
	}
	p.Kill() // it leaves its socket
	p = n.start()
	if _, err := p.Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Error(err)
	}
}
