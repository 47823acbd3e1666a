// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// claimed is a claim as kubelet knows it.
type claimed struct {
	*harness.Volume
	created *csi.Volume // as CreateVolume answered
}

// create makes a claim and the directories that kubelet makes for it.
func (p *plugin) create(r *csi.CreateVolumeRequest) (*claimed, error) {
	created, err := p.Create(p.t.Context(), r)
	if err != nil {
		return nil, err
	}
	c := &claimed{p.Claim(created.VolumeId, r.VolumeCapabilities[0], uidOf(created.VolumeId)), created}
	c.Context = created.VolumeContext
	return c, c.MakeDirs()
}

func (p *plugin) stage(c *claimed) error        { return p.Stage(p.t.Context(), c.Volume) }
func (p *plugin) publishClaim(c *claimed) error { return p.Publish(p.t.Context(), c.Volume) }

// release takes a claim from its pod and from the node.
func (p *plugin) release(c *claimed) error {
	return errors.Join(p.Unpublish(p.t.Context(), c.Volume), p.Unstage(p.t.Context(), c.Volume))
}

// end takes a claim from its pod and from the node, and deletes it.
func (p *plugin) end(c *claimed) error {
	return errors.Join(p.release(c), p.Delete(p.t.Context(), c.ID))
}

// mustCreate makes a claim, which must succeed.
func (p *plugin) mustCreate(req *csi.CreateVolumeRequest) *claimed {
	p.t.Helper()
	c, err := p.create(req)
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// TestManyClaims makes and uses 200 claims of all forms, 16 calls at a time.
func TestManyClaims(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newNode(t, kind, 8<<30).start("-v", "2", "--overcommit", "10")
			requests := []*csi.CreateVolumeRequest{
				create(mounted("ext4")), create(mounted("xfs")), create(mounted("btrfs")), create(device()),
				create(mounted("ext4"), paramPublishAs, "diskImage"), create(device(), paramProvisioning, "thick"),
			}
			for _, r := range requests { // templates first, which take a VM: the test is not about those
				r.Name, r.CapacityRange = "warm", &csi.CapacityRange{RequiredBytes: 300 * mib}
				if r.Parameters[paramProvisioning] == "thick" { // these take their space
					r.CapacityRange.RequiredBytes = 32 * mib
				}
				if err := p.end(p.mustCreate(r)); err != nil {
					t.Fatal(err)
				}
			}
			claims := make([]*claimed, 200)
			start := time.Now()
			inParallel(len(claims), func(i int) {
				template := requests[i%len(requests)]
				r := &csi.CreateVolumeRequest{
					Name: fmt.Sprintf("pvc-%d", i), VolumeCapabilities: template.VolumeCapabilities,
					Parameters: template.Parameters, CapacityRange: template.CapacityRange,
				}
				c, err := p.create(r)
				if err != nil {
					t.Error(err)
					return
				}
				claims[i] = c
				if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
					t.Errorf("%s: %v", c.ID, err)
				}
			})
			t.Logf("200 claims in use after %s", time.Since(start).Round(time.Millisecond))
			if t.Failed() {
				return
			}
			if loops := testenv.LoopsBelow(t, p.Pool); len(loops) != 200-33 { // one for each but the 33 disk images
				t.Errorf("%d loop devices", len(loops))
			}
			start = time.Now()
			inParallel(len(claims), func(i int) {
				if err := p.end(claims[i]); err != nil {
					t.Errorf("%s: %v", claims[i].ID, err)
				}
			})
			t.Logf("gone after %s", time.Since(start).Round(time.Millisecond))
			p.mustHave("none")
			for _, c := range claims {
				if _, err := os.Lstat(c.Target); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("target %s is still there: %v", c.Target, err)
				}
			}
			if list, err := p.ListVolumes(t.Context(), &csi.ListVolumesRequest{}); err != nil || len(list.GetEntries()) > 0 {
				t.Errorf("volumes %v: %v", list, err)
			}
		})
	}
}

// inParallel calls f with 0 to n-1, 16 at a time.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range 16 {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// TestClaims checks over gRPC what the tests of pkg/volume do not see: codes, topology, capacity, tokens, health, and a
// plugin that is killed between any two calls.
func TestClaims(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 8<<30)
			p := n.start()
			for _, test := range []struct {
				name string
				run  func(*plugin)
			}{
				{"capacity", capacity},
				{"small", smallClaims},
				{"formatted", formattedClaims},
				{"copies of any class", copiesOfAnyClass},
				{"validate", validate},
				{"refused", refusedClaims},
				{"snapshots", snapshots},
				{"expansion", expansion},
				{"health", volumeHealth},
			} {
				t.Run(test.name, func(t *testing.T) {
					p := p.with(t)
					p.mustKeep(func() { test.run(p) })
				})
			}
			t.Run("killed between the calls", func(t *testing.T) { killedBetween(p.with(t)) })
		})
	}
}

// killedBetween kills the plugin after each call and starts another.
func killedBetween(p *plugin) {
	t := p.t
	req := create(device(), paramProvisioning, "thick")
	fs := create(mounted("ext4"))
	fs.Name = "filesystem"
	again := func() {
		p.Kill()
		p = p.node.start()
	}
	var claims []*claimed
	for _, r := range []*csi.CreateVolumeRequest{req, fs} {
		claims = append(claims, p.mustCreate(r))
		again()
		if c := p.mustCreate(r); c.ID != claims[len(claims)-1].ID {
			t.Errorf("volume %v", c.created)
		}
	}
	for _, step := range []func(*claimed) error{
		func(c *claimed) error { return p.stage(c) },
		func(c *claimed) error { return p.publishClaim(c) },
		func(c *claimed) error { return errors.Join(p.stage(c), p.publishClaim(c)) },
		func(c *claimed) error { return p.Unpublish(t.Context(), c.Volume) },
		func(c *claimed) error { return p.Unstage(t.Context(), c.Volume) },
		func(c *claimed) error { return p.end(c) },
	} {
		for _, c := range claims {
			if err := step(c); err != nil {
				t.Error(err)
			}
		}
		again()
	}
	p.mustHave("none")
	if code := p.terminate(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestSharedResizer asks a plugin to expand a volume of another node, as a cluster's only external-resizer does.
func TestSharedResizer(t *testing.T) {
	p := newNode(t, testenv.XFS, 4<<30).start("--shared-resizer")
	ask := func(id string) (*csi.ControllerExpandVolumeResponse, error) {
		return p.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 30}})
	}
	r, err := ask("pvc-of-another-node")
	if err != nil || r.GetCapacityBytes() != 1<<30 || !r.GetNodeExpansionRequired() {
		t.Errorf("of another node: %v, %v", r, err)
	}
	c := p.mustCreate(create(mounted("xfs")))
	if r, err := ask(c.ID); err != nil || r.GetCapacityBytes() != 1<<30 {
		t.Errorf("of this node: %v, %v", r, err)
	}
	if v, err := p.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: c.ID}); err != nil || v.GetVolume().GetCapacityBytes() != 1<<30 {
		t.Errorf("it did not grow: %v, %v", v, err)
	}
	if err := p.end(c); err != nil {
		t.Error(err)
	}
}
