// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestCalls begins and ends calls. The last 50 are remembered, beside those that are under way.
func TestCalls(t *testing.T) {
	c := NewCalls()
	slow := c.Begin(time.Now(), "NodePublishVolume", "slow", &Pod{Namespace: "shop", Name: "web", UID: "u1"})
	percent := 7
	slow.Waits("ext4-64m-0123456789abcdef", func() string { return fmt.Sprintf("it is at %d%%", percent) })
	for i := range 60 {
		c.Begin(time.Now(), "NodeStageVolume", fmt.Sprint("v", i), nil).End(Ended{Code: "OK"})
		c.Begin(time.Now(), "Probe", "", nil).End(Ended{Code: "OK", Quiet: true})
	}
	percent = 8
	all := c.List()
	if len(all.UnderWay) != 1 {
		t.Fatalf("under way: %+v", all.UnderWay)
	}
	if r := all.UnderWay[0]; r.WaitsFor != "it is at 8%" || r.Pod.String() != "shop/web" || !r.UnderWay {
		t.Errorf("under way: %+v", r)
	}
	if len(all.Last) != 50 || all.Last[0].Object != "v59" || all.Last[49].Object != "v10" {
		t.Errorf("%d calls, %+v", len(all.Last), all.Last)
	}
	slow.End(Ended{Code: "Aborted", Cause: CauseTemplate, Took: time.Second, Err: errors.New("it was at 8%")})
	all = c.List()
	if len(all.UnderWay) != 0 {
		t.Errorf("%+v", all.UnderWay)
	}
	r := all.Last[0]
	if r.Error != "it was at 8%" || r.Cause != CauseTemplate || r.Template == "" || r.UnderWay || r.Duration != 1 {
		t.Errorf("%+v", r)
	}
	if of := all.Of(func(r Request) bool { return r.Object == "slow" }); len(of) != 1 {
		t.Errorf("%+v", of)
	}
}

// TestFailedCalls remembers the last failure of an object until a call of it succeeds, whatever else comes.
func TestFailedCalls(t *testing.T) {
	c := NewCalls()
	fail := func(method, object, text string) {
		quiet := strings.Contains(method, "Get")
		c.Begin(time.Now(), method, object, nil).End(Ended{Cause: CauseSpace, Err: errors.New(text), Quiet: quiet})
	}
	fail("NodePublishVolume", "a", "first")
	fail("NodePublishVolume", "a", "second")
	fail("NodeGetVolumeStats", "a", "stats")
	fail("NodePublishVolume", "b", "third")
	for range 2 * keptCalls {
		c.Begin(time.Now(), "NodePublishVolume", "other", nil).End(Ended{Code: "OK"})
	}
	if f := c.List().Failed; len(f) != 2 || f[0].Error != "third" || f[1].Error != "second" {
		t.Errorf("%+v", f)
	}
	c.Begin(time.Now(), "NodeUnpublishVolume", "a", nil).End(Ended{Code: "OK"})
	if f := c.List().Failed; len(f) != 1 || f[0].Object != "b" {
		t.Errorf("%+v", f)
	}
	for i := range 2 * keptFailures {
		fail("CreateVolume", fmt.Sprint("pvc-", i), "full")
	}
	if f := c.List().Failed; len(f) != keptFailures || f[0].Object != fmt.Sprint("pvc-", 2*keptFailures-1) {
		t.Errorf("%d failures, the newest %+v", len(f), f[0])
	}
}

// TestHostileNames keeps no name that is too long to be one.
func TestHostileNames(t *testing.T) {
	c := NewCalls()
	c.Begin(time.Now(), "NodePublishVolume", strings.Repeat("x", 1<<18), nil).End(Ended{Err: errors.New("long")})
	if all := c.List(); len(all.Last[0].Object) != maxName || len(all.Failed[0].Object) != maxName {
		t.Errorf("%d bytes", len(all.Last[0].Object))
	}
}

// BenchmarkCalls is what each CSI call takes to be remembered.
func BenchmarkCalls(b *testing.B) {
	c := NewCalls()
	pod, began := &Pod{Namespace: "shop", Name: "web", UID: "u1"}, time.Now()
	b.ReportAllocs()
	for b.Loop() {
		c.Begin(began, "NodePublishVolume", "csi-0123456789", pod).End(Ended{Code: "OK"})
	}
}
