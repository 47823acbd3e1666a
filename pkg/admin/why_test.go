// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"strings"
	"testing"
	"time"
)

// TestExplain asks for pods of all kinds.
func TestExplain(t *testing.T) {
	pod := func(name string) *Pod { return &Pod{Namespace: "shop", Name: name, UID: "uid-" + name} }
	percent := 18
	ago := func(s time.Duration) time.Time { return time.Now().Add(-s * time.Second) }
	failed := func(object, name string, cause Cause, text string) Request {
		r := Request{Method: "NodePublishVolume", Object: object, Began: ago(9), Cause: cause, Code: "x", Error: text}
		if name != "" {
			r.Pod = pod(name)
		}
		return r
	}
	building := failed("v2", "building", CauseTemplate, "template is being built: 3%")
	built := failed("v3", "built", CauseTemplate, "being built")
	building.Template, built.Template = "ext4-64m-a", "ext4-64m-b"
	gone := failed("v5", "gone", CauseNode, "EBUSY")
	gone.Method = "NodeUnpublishVolume"
	s := Seen{
		Requests: Requests{
			UnderWay: []Request{
				{
					Method: "NodePublishVolume", Object: "v1", Pod: pod("slow"), Began: ago(2), UnderWay: true,
					WaitsFor: "template x is queued", Template: "ext4-64m-a",
				},
				{Method: "CreateVolume", Object: "pvc-1", Began: ago(2), UnderWay: true},
				{Method: "Probe", Began: ago(1), UnderWay: true},
			},
			Failed: []Request{
				failed("v1", "slow", CauseTemplate, "an older failure"), building, built,
				failed("v4", "full", CauseSpace, "pool is full: 3Gi are missing"), gone, failed("claim", "", CauseNode, "staging failed"),
			},
		},
		Volumes: []Volume{
			{ID: "v6", Lifecycle: "inline", Pod: pod("fine"), PublishedAt: []string{"/k/pods/uid-fine/volumes/x/mount"}},
			{ID: "claim", Lifecycle: "claim", Claim: "pvc-2", State: Idle},
			{ID: "used", Lifecycle: "claim", Claim: "pvc-3", PublishedAt: []string{"/k/pods/uid-fine/volumes/y/mount"}},
		},
		Templates: []Template{{Key: "ext4-64m-a", State: Building, Reason: "template is being built: 18%", Percent: &percent}},
	}
	for _, c := range []struct {
		asked   string
		cause   Cause
		text    string
		volumes int
	}{
		{"shop/slow", CauseTemplate, "template x is queued", 0},
		{"uid-slow", CauseTemplate, "template x is queued", 0},
		{"shop/building", CauseTemplate, "template is being built: 18%", 0},
		{"shop/built", CauseTemplate, "has been built since", 0},
		{"shop/full", CauseSpace, "3Gi are missing", 0},
		{"v4", CauseSpace, "3Gi are missing", 0},
		{"pvc-1", CauseBusy, "CreateVolume", 0},
		{"pvc-2", CauseNode, "staging failed", 1}, // the claim's name leads to its id
		{"shop/fine", "", "", 1},
		{"uid-fine", "", "", 2}, // the claim's path tells the pod's uid
		{"shop/gone", "", "", 0},
		{"shop/other", "", "", 0},
		{"", "", "", 0},
		{"shop/", "", "", 0},
	} {
		w := Explain(c.asked, s)
		if len(w.Volumes) != c.volumes {
			t.Errorf("%s: volumes %+v", c.asked, w.Volumes)
		}
		if c.cause == "" {
			if len(w.Waits) != 0 {
				t.Errorf("%s: %+v", c.asked, w.Waits)
			}
			continue
		}
		if len(w.Waits) != 1 {
			t.Errorf("%s: %+v, want %s: %s", c.asked, w.Waits, c.cause, c.text)
			continue
		}
		if is := w.Waits[0]; is.Cause != c.cause || !strings.Contains(is.Text, c.text) || is.Remedy == "" {
			t.Errorf("%s: %+v, want %s: %s", c.asked, is, c.cause, c.text)
		}
	}
	if w := Explain("shop/building", s); w.Waits[0].Percent == nil || *w.Waits[0].Percent != 18 {
		t.Errorf("%+v", w.Waits)
	}
	if w := Explain("shop/other", s); len(w.Others) != 2 || w.Others[1].Text != "staging failed" {
		t.Errorf("calls that name no pod: %+v", w.Others)
	}
}
