// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
)

// whyOf is what the command says of a pod.
func (b *born) whyOf(asked string) (w admin.Why) {
	b.Helper()
	out, _ := b.asked(0, "why", asked, "-o", "json")
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		b.Fatalf("%s: %v", out, err)
	}
	return w
}

// waits checks the one thing that a pod waits for.
func (b *born) waits(asked string, cause admin.Cause, says string) {
	b.Helper()
	w := b.whyOf(asked)
	if len(w.Waits) != 1 || w.Waits[0].Cause != cause || !strings.Contains(w.Waits[0].Text, says) || w.Waits[0].Remedy == "" {
		b.Errorf("%s waits for %+v, want %s: %s", asked, w.Waits, cause, says)
	}
}

// TestWhy asks for pods whose volumes wait, or cannot be had.
func TestWhy(t *testing.T) {
	b := startBorn(t, testenv.XFS, "contents:\n- {name: gone, tar: gone.tar, namespaces: [shop]}\n", "--warm-max", "0")
	for id, attributes := range map[string][]string{
		"sized": {"size", "lots"}, "named": {"colour", "red"}, "gone": {"content", "gone", "size", "64Mi"},
	} {
		if _, err := b.publish(id, "ext4", attributes...); err == nil {
			t.Errorf("%s was published", id)
		}
	}
	b.waits("shop/sized", admin.CauseRequest, `volume attribute size "lots"`)
	b.waits("shop/named", admin.CauseRequest, `volume attribute "colour": unknown; allowed are`)
	b.waits("shop/gone", admin.CauseContent, "gone.tar: no such file")
	b.shows("why-refused", "why", "shop/named")
	b.shows("why-content", "why", "shop/gone")
	b.shows("why-json", "why", "shop/named", "-o", "json")

	// A pod that waits for its template, while its call is under way and between two calls.
	v := b.Inline("slow", "xfs", harness.Pod{Namespace: "shop", Name: "slow", UID: "slow"}, map[string]string{"size": "320Mi"})
	if err := v.MakeDirs(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	called := make(chan error)
	go func() { called <- b.client.Publish(ctx, v) }()
	testenv.Eventually(t, "the call is under way", func() bool { return len(b.whyOf("shop/slow").Waits) > 0 })
	b.waits("shop/slow", admin.CauseTemplate, "template xfs 320Mi is being built")
	if out, _ := b.asked(0, "template", "list"); !strings.Contains(out, "building") {
		t.Errorf("no template is being built:\n%s", out)
	}
	if err := <-called; err == nil {
		t.Fatal("the VM was faster than a second")
	}
	b.waits("slow", admin.CauseTemplate, "template xfs 320Mi is being built") // by its uid
	for !b.prewarmedHas("xfs-320m") {
		time.Sleep(100 * time.Millisecond)
	}
	testenv.Eventually(t, "the build has ended", func() bool {
		w := b.whyOf("shop/slow")
		return len(w.Waits) == 1 && strings.Contains(w.Waits[0].Text, "has been built since its last try")
	})
	v = b.mustPublish("slow", "xfs", "size", "320Mi")
	if w := b.whyOf("shop/slow"); len(w.Waits) != 0 || len(w.Volumes) != 1 || w.Volumes[0].State != admin.Published {
		t.Errorf("%+v", w)
	}
	b.shows("why-nothing", "why", "shop/slow")

	// A pool that has no space, and pods that nobody knows.
	b.Kill()
	if _, told := b.asked(1, "why", "shop/slow"); !strings.Contains(told, "only a running plugin knows") {
		t.Error(told)
	}
	b.again("--headroom", "447Mi")
	if _, err := b.publish("full", "xfs", "size", "320Mi"); err == nil {
		t.Error("a full pool took a volume")
	}
	b.waits("shop/full", admin.CauseSpace, "pool is full")
	if w := b.whyOf("shop/full"); len(w.Findings) != 1 || w.Findings[0].Code != "PoolFull" {
		t.Errorf("%+v", w.Findings)
	}
	for asked, says := range map[string]string{
		"shop/fulll": "this node knows no volume of shop/fulll; did you mean shop/full?",
		"ci/job":     "the pod may be on another node, or kubelet has not asked for its volumes yet",
		"":           "name one pod, as NAMESPACE/NAME",
	} {
		if _, told := b.asked(1, "why", asked); !strings.Contains(told, says) {
			t.Errorf("%s: %s", asked, told)
		}
	}
	// A call that does not tell its pod.
	claim := b.Claim("pvc-lost", harness.Mounted("ext4"), "uid-claim")
	if err := b.client.Stage(t.Context(), claim); err == nil {
		t.Error("a claim that is not there was staged")
	}
	b.waits("pvc-lost", admin.CauseRequest, "there is no volume pvc-lost on this node")
	if out, _ := b.asked(0, "why", "ci/job"); !strings.Contains(out, "It may be its volume:") || !strings.Contains(out, "pvc-lost") {
		t.Error(out)
	}
	b.mustUnpublish(v)
}

func (b *born) prewarmedHas(kind string) bool {
	for _, have := range b.templates() {
		if have == kind {
			return true
		}
	}
	return false
}
