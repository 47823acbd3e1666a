// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// fullPool clones and formats until the pool is full.
func fullPool(p *plugin) {
	t := p.t
	claim := p.mustCreate(create(mounted("ext4")))
	testenv.Fill(t, p.Pool)
	var made []*csi.NodePublishVolumeRequest
	var failed error
	for i := 0; failed == nil && i < 3000; i++ { // some clones still fit into the last blocks
		r := p.request(fmt.Sprintf("more-%d", i), "ext4", "size", "300Mi")
		before := p.volumes()
		if _, failed = p.NodePublishVolume(t.Context(), r); failed == nil {
			made = append(made, r)
		} else {
			p.mustHave(before)
		}
	}
	t.Logf("cloning, after %d volumes: %v", len(made), failed)
	mustSay(t, failed, codes.ResourceExhausted, "full", "csi-disktemplate clean-all --pool "+p.Pool)
	p.refused(p.request("another", "ext4", "size", "320Mi"), codes.ResourceExhausted, "full")
	p.saysFull(true, claim.ID)
	for _, r := range made {
		p.unpublish(r)
	}
	if err := os.Remove(filepath.Join(p.Pool, "filler")); err != nil {
		t.Error(err)
	}
	// btrfs frees it only at a commit. A volume that finds no space has the plugin make one, not more often than now and then.
	again := p.request("again", "ext4", "size", "300Mi")
	testenv.Eventually(t, "the space of the removed file", func() bool {
		_, err := p.NodePublishVolume(t.Context(), again)
		if err != nil {
			mustSay(t, err, codes.ResourceExhausted, "full")
			return false
		}
		p.unpublish(again)
		return len(p.backendHealth()) == 0
	})
	p.saysFull(false, claim.ID)
	if err := p.Delete(t.Context(), claim.ID); err != nil {
		t.Error(err)
	}
}

// saysFull checks that everything that tells of the pool, or of a claim in it, says whether the pool is full.
func (p *plugin) saysFull(full bool, claim string) {
	t := p.t
	t.Helper()
	if got := strings.Join(p.backendHealth(), ", "); full != (got == "STORAGE_DEGRADED PoolFull") || !full && got != "" {
		t.Errorf("NodeGetStorageHealth: %s", got)
	}
	ofNode, err := p.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: claim, VolumePublishPath: p.Target(uidOf(claim), claim)})
	if err != nil {
		t.Fatal(err)
	}
	ofController, err := p.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: claim})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []*csi.VolumeHealth{ofNode.GetVolumeHealth(), ofController.GetVolumeHealth()} {
		if s := h.GetHealthStatuses(); full && (len(s) != 1 || s[0].GetReason() != "PoolFull" || s[0].GetStatus() != csi.VolumeHealthErrorType_DEGRADED) || !full && len(s) > 0 {
			t.Errorf("the claim's health is %v", h)
		}
	}
	code, body := p.get("/readyz")
	if code != 200 || full != strings.Contains(body, "ok\ndegraded: PoolFull since ") || !full && body != "ok\n" {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if probe, err := p.Probe(t.Context(), &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("Probe: %v %v", probe, err)
	}
	if got := p.metric(`csi_disktemplate_condition{code="PoolFull"}`) == 1; got != full {
		t.Errorf("the metric of the condition: %v", got)
	}
	// It comes and goes with each file, so it has ended only after half a minute.
	if n := len(p.log.lines("] \"A condition ended\"", `condition="PoolFull"`)); n > 0 {
		t.Errorf("the log says that it ended: %d lines", n)
	}
	if n := len(p.log.lines("] \"A condition began", `condition="PoolFull"`)); n != 1 {
		t.Errorf("the log says %d times that it began", n)
	}
}

// backendHealth is what NodeGetStorageHealth says, as "STORAGE_DEGRADED PoolFull".
func (p *plugin) backendHealth() (found []string) {
	p.t.Helper()
	node, err := p.NodeGetStorageHealth(p.t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, h := range node.GetBackendHealth() {
		found = append(found, h.GetStatus().String()+" "+h.GetReason())
	}
	return found
}

// TestInlineLimits asks for larger and more inline volumes, and more templates, than the flags allow.
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
	p.publish(first) // repeated: the volume is there already
	p.unpublish(first)
	third := of("farm", "third", "300Mi")
	p.publish(third)
	p.unpublish(third)
	p.unpublish(other)
}

// TestTemplateCache has a budget that no template fits into. The latest template stays, and all volumes do.
func TestTemplateCache(t *testing.T) {
	p := newNode(t, testenv.XFS, 1<<30).start("--template-cache", "1Ki")
	first, second := p.request("first", "ext4", "size", "64Mi"), p.request("second", "ext4", "size", "65Mi")
	p.publish(first)
	p.publish(second)
	templates, err := os.ReadDir(filepath.Join(p.Pool, "templates"))
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
