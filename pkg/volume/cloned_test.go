// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestCloned counts hits and misses. A volume counts once, whatever its callers went through. It is a miss if its template
// was not there when it was asked for first, whether its caller waited, gave up and came back, or was refused.
func TestCloned(t *testing.T) {
	var hits, misses, builds atomic.Int32
	n := newNodeWith(t, testenv.XFS, 4*gib, Config{Made: func(r Result) {
		switch {
		case r.Template == "":
		case r.TemplateHit:
			hits.Add(1)
		default:
			misses.Add(1)
		}
	}})
	formatter, err := vmformat.New(vmformat.Config{Init: testenv.Binary(t), CacheDir: testenv.CacheDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	gate := make(chan bool) // a build ends when it is told whether it succeeds
	n.contents.templates = template.NewStore(template.Config{
		Pool: n.pool, Fingerprint: func(spec diskfs.Spec) (string, error) { return formatter.Fingerprint(spec, nil) }, MaxBuilds: 8, BuildsPerHour: 8,
		Observe: func(_ diskfs.Spec, _ time.Duration, err error) {
			if err == nil {
				builds.Add(1)
			}
		},
		Format: func(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
			if !<-gate {
				return template.Provenance{}, errors.New("a disk that fails")
			}
			return formatOnce(ctx, formatter, f, spec)
		},
	})
	t.Cleanup(n.contents.templates.Close)
	counted := func(what string, b, m, h int32) {
		t.Helper()
		if builds.Load() != b || misses.Load() != m || hits.Load() != h {
			t.Errorf("%s: %d builds, %d misses, %d hits; expected %d, %d, %d", what, builds.Load(), misses.Load(), hits.Load(), b, m, h)
		}
	}
	hasty := func(do func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := do(ctx); !errors.Is(err, template.ErrBuilding) && !errors.Is(err, errdefs.ErrUnderWay) {
			t.Fatalf("a caller without time: %v", err)
		}
	}
	publish := func(r InlineRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, err := n.PublishInline(ctx, r); return err }
	}
	create := func(r ClaimRequest) func(context.Context) error {
		return func(ctx context.Context) error { _, _, err := n.CreateClaim(ctx, r); return err }
	}
	built := func(want int32) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); builds.Load() != want; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d builds ended, not %d", builds.Load(), want)
			}
		}
	}

	// Four kinds, whose callers all give up and come back when the templates are there.
	var inline []InlineRequest
	for i := range 4 {
		inline = append(inline, n.request(fmt.Sprint("kind-", i), "ext4", int64(64+i)*mib))
		hasty(publish(inline[i]))
		hasty(publish(inline[i]))
	}
	counted("nobody has a volume yet", 0, 0, 0)
	for range 4 {
		gate <- true
	}
	built(4)
	for _, r := range inline {
		if res := n.mustPublish(r); res.TemplateHit {
			t.Errorf("%s came back to a hit", r.ID)
		}
	}
	counted("all came back", 4, 4, 0)
	for _, r := range inline {
		n.mustPublish(r)
	}
	counted("published again", 4, 4, 0)
	more := n.request("more", "ext4", 64*mib)
	if res := n.mustPublish(more); !res.TemplateHit {
		t.Error("its template was there")
	}
	counted("one more of a kind", 4, 4, 1)

	// Two wait for one build to its end; it fails at first.
	waiting := []InlineRequest{n.request("first", "ext4", 70*mib), n.request("second", "ext4", 70*mib)}
	for _, ok := range []bool{false, true} {
		results := make(chan error)
		for _, r := range waiting {
			go func() { results <- publish(r)(t.Context()) }()
		}
		time.Sleep(100 * time.Millisecond) // let both join the build
		gate <- ok
		for range waiting {
			if err := <-results; (err == nil) != ok {
				t.Fatalf("the build succeeds %v: %v", ok, err)
			}
		}
	}
	counted("two that waited", 5, 6, 1)

	// Claims. The work for the thick one goes on and ends while nobody asks.
	thin, thick := claim("thin", "ext4", 80*mib), claim("thick", "ext4", 81*mib)
	thick.Provisioning = image.Thick
	for _, r := range []ClaimRequest{thin, thick} {
		hasty(create(r))
		gate <- true
	}
	built(7)
	testenv.Eventually(t, "the thick claim", func() bool { _, err := n.GetClaim("thick"); return err == nil })
	for _, r := range []ClaimRequest{thin, thick} {
		for range 2 {
			if err := create(r)(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	counted("claims", 7, 8, 1)

	// The budget of builds is used up: 8 began. Somebody else makes the template meanwhile.
	refused := n.request("refused", "ext4", 90*mib)
	if err := publish(refused)(t.Context()); !errors.Is(err, template.ErrTooMany) {
		t.Errorf("beyond the budget: %v", err)
	}
	other := template.NewStore(template.Config{Pool: n.pool, Fingerprint: func(spec diskfs.Spec) (string, error) { return formatter.Fingerprint(spec, nil) }, Format: func(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
		return formatOnce(ctx, formatter, f, spec)
	}})
	defer other.Close()
	made, err := other.Ensure(t.Context(), refused.Spec)
	if err != nil {
		t.Fatal(err)
	}
	made.Close()
	n.mustPublish(refused)
	counted("refused, and then there", 7, 9, 1)
	if n := len(n.contents.misses.noted); n > 0 {
		t.Errorf("%d volumes are remembered, and all are made", n)
	}

	for _, r := range append(append(inline, waiting...), more, refused) {
		n.mustUnpublish(r)
	}
	n.mustDelete("thin")
	n.mustDelete("thick")
}
