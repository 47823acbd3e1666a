// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

var (
	// changing is what differs from run to run in a message.
	changing = regexp.MustCompile(`[0-9.]+[KMGT]i\b|[0-9]+m[0-9]+s|[0-9]+ ?s\b|pvc-[0-9a-f-]+`)
	// poolFlag is part of a command that a message recommends.
	poolFlag = regexp.MustCompile(" --pool [^`]*")
)

// masked is a message without what changes.
func masked(message string) string {
	return changing.ReplaceAllString(poolFlag.ReplaceAllString(message, ""), "N")
}

// exemplary checks that an error is as docs/errors.md has it, its figures aside.
func exemplary(t *testing.T, kind string, err error) {
	t.Helper()
	for _, e := range errorExamples {
		if e.kind != kind {
			continue
		}
		want, more := strings.CutSuffix(masked(e.text), "…") // figures and paths follow
		got := masked(status.Convert(err).Message())
		if same := got == want || more && strings.HasPrefix(got, want); status.Code(err) != e.code || !same {
			t.Errorf("%s: %v\nis documented as %s %s", kind, err, e.code, e.text)
		}
		return
	}
	t.Errorf("no example is called %s", kind)
}

// TestErrorExamples provokes the errors of docs/errors.md that depend on the node.
func TestErrorExamples(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	p := n.start("--max-inline-size", "300Mi", "--max-inline-volumes-per-namespace", "1", "--max-template-builds-per-hour", "2")
	publish := func(within time.Duration, r *csi.NodePublishVolumeRequest) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := p.NodePublishVolume(ctx, r)
		return err
	}
	exemplary(t, tooLarge, publish(patience, p.request("large", "ext4", "size", "301Mi")))
	exemplary(t, noContents, publish(patience, p.request("contents", "", "content", "postgres")))
	exemplary(t, noGoldens, publish(patience, p.request("goldens", "", "from", "golden/go-cache")))

	slow, done := p.request("slow", "ext4", "size", "64Mi"), make(chan error, 1)
	go func() { done <- publish(patience, slow) }()
	p.vm()
	exemplary(t, isBusy, publish(patience, slow))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	exemplary(t, ofLimit, publish(patience, p.request("second", "ext4", "size", "64Mi")))
	other := func(r *csi.NodePublishVolumeRequest) *csi.NodePublishVolumeRequest {
		r.VolumeContext[keyPodNS] = "bank"
		return r
	}
	exemplary(t, isBuilding, publish(time.Second, other(p.request("built", "ext4", "size", "65Mi"))))
	exemplary(t, ofBuilds, publish(patience, other(p.request("kind", "ext4", "size", "66Mi"))))
	p.unpublish(slow)
	claimErrors(t, p)
	p.terminate()

	p = n.start("--qemu", "/nonexistent")
	exemplary(t, noBuilder, publish(patience, p.request("unbuilt", "ext4", "size", "67Mi")))
}

// claimErrors provokes those of claims.
func claimErrors(t *testing.T, p *plugin) {
	large := create(mounted("ext4"))
	large.CapacityRange = &csi.CapacityRange{RequiredBytes: 64 << 30}
	_, err := p.CreateVolume(t.Context(), large)
	exemplary(t, isFull, err)
	copied := create(mounted("ext4"))
	copied.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: "pvc-elsewhere"}}}
	copied.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{
		{Segments: map[string]string{TopologyKey: "node-of-test"}}}}
	_, err = p.CreateVolume(t.Context(), copied)
	exemplary(t, isAway, err)
	c := p.mustCreate(create(device()))
	wrong := *c.Volume
	wrong.Capability = mounted("")
	exemplary(t, isDisk, p.Stage(t.Context(), &wrong))
	wrong.ID = "pvc-elsewhere"
	exemplary(t, isGone, p.Stage(t.Context(), &wrong))
	onePod := *c.Volume
	onePod.Capability = device()
	onePod.Capability.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	if err := errors.Join(p.stage(c), p.Publish(t.Context(), &onePod)); err != nil {
		t.Fatal(err)
	}
	onePod.Target = p.Target(uidOf("another"), c.ID)
	if err := onePod.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	exemplary(t, isOnePods, p.Publish(t.Context(), &onePod))
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}
