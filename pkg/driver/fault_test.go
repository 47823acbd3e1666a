// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package driver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestPoolTaken takes the pool away from a running plugin, in each way that an administrator may. The plugin says so,
// makes nothing new, and still unpublishes what is there. Once the pool is back, everything works again.
func TestPoolTaken(t *testing.T) {
	n := newNode(t, testenv.XFS, 1<<30)
	at := filepath.Dir(n.Pool)
	source := strings.TrimSpace(testenv.Run(t, "findmnt", "-n", "-o", "SOURCE", "--mountpoint", at))
	other := testenv.XFS.Pool(t)
	decoys := []string{filepath.Join(other, "pool", "volumes", "inline"), filepath.Join(other, "pool", "volumes", "claim")}
	for _, path := range decoys {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("another's"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	p := n.start()
	claim := p.inUse("claim")
	unused := p.mustCreate(ext4Claim("unused"))
	for _, c := range []struct {
		name, says string
		take, back []string
	}{
		{"unmounted lazily", "mount it again and restart the plugin", []string{"umount", "--lazy", at}, []string{"mount", source, at}},
		{"another mounted over it", "mounted over it or unmounted", []string{"mount", "--bind", other, at}, []string{"umount", at}},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := p.with(t)
			inline := q.request("inline", "ext4", "size", "64Mi")
			q.publish(inline)
			q.await("volumes that are ready", q.AllReady)
			testenv.Run(t, c.take[0], c.take[1:]...)
			q.cannot("pool is not usable", n.Pool, c.says)
			if _, err := q.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: "inline", VolumePath: inline.TargetPath}); err != nil {
				t.Errorf("stats: %v", err)
			}
			q.mustHold(claim)
			q.unpublish(inline)
			if err := q.release(claim); err != nil {
				t.Errorf("unpublishing and unstaging: %v", err)
			}
			testenv.Run(t, c.back[0], c.back[1:]...)

			if code := q.terminate(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			p = n.start()
			q = p.with(t)
			if code, body := q.get("/readyz"); code != 200 {
				t.Errorf("/readyz: %d %s", code, body)
			}
			if err := errors.Join(q.stage(claim), q.publishClaim(claim)); err != nil {
				t.Fatal(err)
			}
			q.mustHold(claim)
			if _, err := os.Lstat(filepath.Join(n.Pool, "volumes", "inline")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the volume that was unpublished: %v", err)
			}
			q.publish(inline) // made anew
			q.unpublish(inline)
			for _, path := range decoys {
				if b, err := os.ReadFile(path); err != nil || string(b) != "another's" {
					t.Errorf("%s holds %q: %v", path, b, err)
				}
			}
		})
	}
	t.Run("read-only", func(t *testing.T) {
		q := p.with(t)
		if err := q.release(claim); err != nil { // a remount read-only needs that nothing is open for writing
			t.Fatal(err)
		}
		image := q.request("image", "ext4", "size", "64Mi", "publishAs", "diskImage")
		q.publish(image)
		q.await("volumes that are ready", q.AllReady)
		if out, err := testenv.Try("mount", "-o", "remount,ro", at); err == nil || !strings.Contains(out, "busy") {
			t.Errorf("mounting the pool read-only while volumes are kept ready: %v\n%s", err, out)
		}
		if code := q.terminate(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		p = n.start("--warm-max", "0")
		p := p.with(t)
		testenv.ReadOnly(t, at)
		p.cannot("pool is not usable", n.Pool, "read-only", "remount it")
		mustSay(t, p.stage(claim), codes.FailedPrecondition, "read-only", "remount it")
		// The pod no longer has the volume. The image stays until it can be removed.
		for range 2 {
			_, err := p.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "image", TargetPath: image.TargetPath})
			t.Log(err)
			mustSay(t, err, codes.FailedPrecondition, "read-only", "remount it")
			if left := n.mounts(); len(left) > 0 {
				t.Errorf("mounts %v", left)
			}
		}
		testenv.Run(t, "mount", "-o", "remount,rw", at)
		if code, body := p.get("/readyz"); code != 200 {
			t.Errorf("/readyz: %d %s", code, body)
		}
		p.unpublish(image)
		if err := errors.Join(p.stage(claim), p.publishClaim(claim)); err != nil {
			t.Fatal(err)
		}
		p.mustHold(claim)
	})
	t.Run("without a place for locks", func(t *testing.T) {
		p := p.with(t)
		locks := filepath.Join(n.Pool, "locks")
		testenv.Run(t, "chattr", "+i", locks)
		defer testenv.Run(t, "chattr", "-i", locks)
		p.refused(p.request("new", "ext4", "size", "65Mi"), codes.FailedPrecondition, locks, "lsattr -d")
		hit := p.request("hit", "ext4", "size", "64Mi") // a hit takes no lock
		p.publish(hit)
		p.unpublish(hit)
	})
	if err := errors.Join(p.end(claim), p.end(unused)); err != nil {
		t.Error(err)
	}
}

func ext4Claim(name string) *csi.CreateVolumeRequest {
	r := create(mounted("ext4"))
	r.Name, r.CapacityRange = name, &csi.CapacityRange{RequiredBytes: 64 * mib}
	return r
}

// mustHold reads what inUse wrote, and writes it again.
func (p *plugin) mustHold(c *claimed) {
	p.t.Helper()
	path := filepath.Join(c.Target, "file")
	if b, err := os.ReadFile(path); err != nil || string(b) != "kept" {
		p.t.Errorf("the claim's file holds %q, expected \"kept\": %v", b, err)
	}
	if err := os.WriteFile(path, []byte("kept"), 0o644); err != nil {
		p.t.Error(err)
	}
}

// inUse makes a claim that a pod uses, with a file in it.
func (p *plugin) inUse(name string) *claimed {
	p.t.Helper()
	c := p.mustCreate(ext4Claim(name))
	if err := errors.Join(p.stage(c), p.publishClaim(c)); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.Target, "file"), []byte("kept"), 0o644); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// cannot checks that the plugin makes nothing new, and says why.
func (p *plugin) cannot(says ...string) {
	t := p.t
	t.Helper()
	code, body := p.get("/readyz")
	t.Logf("/readyz: %d %s", code, body)
	for _, s := range says {
		if code != 503 || !strings.Contains(body, s) {
			t.Errorf("/readyz: %d %s", code, body)
		}
	}
	_, err := p.Probe(t.Context(), &csi.ProbeRequest{})
	mustSay(t, err, codes.FailedPrecondition, says...)
	_, err = p.NodePublishVolume(t.Context(), p.request("new", "ext4", "size", "64Mi"))
	t.Log(err)
	mustSay(t, err, codes.FailedPrecondition, says...)
	_, err = p.create(create(mounted("ext4"), paramProvisioning, "thick"))
	mustSay(t, err, codes.FailedPrecondition, says...)
	_, err = p.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "new", SourceVolumeId: "claim"})
	mustSay(t, err, codes.FailedPrecondition, says...)
	_, err = p.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	mustSay(t, err, codes.FailedPrecondition, says...)
	_, err = p.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "unused"})
	mustSay(t, err, codes.FailedPrecondition, says...)
	health, err := p.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(health.GetBackendHealth()) != 1 || health.GetBackendHealth()[0].GetReason() != "PoolUnusable" {
		t.Errorf("health %v: %v", health, err)
	}
}
