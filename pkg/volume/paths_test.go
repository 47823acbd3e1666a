// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// outside makes a directory outside of kubelet's, with a mount of the volume in it that has
// the same name as its target. Code that followed a link there would find nothing wrong. end
// unmounts it, and fails if it was unmounted before.
func (n *node) outside(target string) (dir string, end func()) {
	n.t.Helper()
	dir = testenv.Dir(n.t)
	at := filepath.Join(dir, filepath.Base(target))
	fi, err := os.Stat(target)
	if err == nil && fi.IsDir() {
		err = os.Mkdir(at, 0o755)
	} else if err == nil {
		err = os.WriteFile(at, nil, 0o600)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	testenv.Run(n.t, "mount", "--rbind", target, at)
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		if out, err := testenv.Try("umount", "--recursive", at); err != nil {
			n.t.Errorf("the mount outside of kubelet's directory: %v\n%s", err, out)
		}
	}
	n.t.Cleanup(end)
	return dir, end
}

// swap replaces a directory by a link. back undoes it.
func (n *node) swap(dir, outside string) (back func()) {
	n.t.Helper()
	away := dir + ".away"
	if err := errors.Join(os.Rename(dir, away), os.Symlink(outside, dir)); err != nil {
		n.t.Fatal(err)
	}
	return func() {
		n.t.Helper()
		if err := errors.Join(os.Remove(dir), os.Rename(away, dir)); err != nil {
			n.t.Fatal(err)
		}
	}
}

// TestSwappedForALink replaces a directory on the way to a volume by a link, between two
// calls. Every call refuses, says why, and touches nothing behind the link. When the
// directory is back, everything works again.
func TestSwappedForALink(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	const link = "symbolic link"
	for _, mode := range image.MountModes {
		t.Run("inline/"+string(mode), func(t *testing.T) {
			n := n.with(t)
			r := n.request("inline-"+strings.ToLower(string(mode)), "ext4", 64*mib)
			r.Mode = mode
			n.mustPublish(r)
			outside, end := n.outside(r.Target)
			back := n.swap(filepath.Dir(r.Target), outside)
			_, err := n.PublishInline(t.Context(), r)
			refused(t, "publish", err, errdefs.ErrInvalid, link)
			refused(t, "unpublish", n.Unpublish(r.ID, r.Target), errdefs.ErrState, link, filepath.Dir(r.Target)+".away/mount")
			_, err = n.Stats(r.ID, r.Target)
			refused(t, "stats", err, errdefs.ErrNotFound, link)
			back()
			if res := n.mustPublish(r); !res.Existed {
				t.Error("the volume was gone")
			}
			end()
			n.mustUnpublish(r)
		})
	}
	for form, r := range map[string]ClaimRequest{
		"filesystem": claim("fs", "ext4", 64*mib),
		"diskImage":  {Name: "image", Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage},
		"block":      disk("block", 8*mib),
	} {
		t.Run("claim/"+form, func(t *testing.T) {
			n := n.with(t)
			v := n.mustCreate(r)
			target := n.mustPublishClaim(v, "pod")
			request, stage := n.publishRequest(v, "pod"), StageRequest{ID: v.ID, Staging: n.staging(v.ID), Use: use(v)}

			outside, end := n.outside(target)
			back := n.swap(filepath.Dir(target), outside)
			refused(t, "publish", n.PublishClaim(t.Context(), request), errdefs.ErrInvalid, link)
			refused(t, "unpublish", n.Unpublish(v.ID, target), errdefs.ErrState, link)
			_, err := n.Stats(v.ID, target)
			refused(t, "stats", err, errdefs.ErrNotFound, link)
			_, err = n.ExpandOnNode(v.ID, target, Size{Required: 128 * mib}, nil)
			refused(t, "expand", err, errdefs.ErrNotFound, link)
			back()
			n.mustUnpublishClaim(v, "pod")
			end()

			outside, end = n.outside(stage.Staging) // for a disk this is an empty directory
			back = n.swap(filepath.Dir(stage.Staging), outside)
			refused(t, "stage", n.Stage(t.Context(), stage), errdefs.ErrInvalid, link)
			refused(t, "publish from there", n.PublishClaim(t.Context(), request), errdefs.ErrInvalid, link)
			_, err = n.Stats(v.ID, stage.Staging)
			refused(t, "stats", err, errdefs.ErrNotFound, link)
			_, err = n.ExpandOnNode(v.ID, stage.Staging, Size{Required: 128 * mib}, nil)
			refused(t, "expand", err, errdefs.ErrNotFound, link)
			if v.Mode == image.ModeFilesystem {
				refused(t, "unstage", n.Unstage(v.ID, stage.Staging), errdefs.ErrState, ".away/globalmount")
			} else if err := n.Unstage(v.ID, stage.Staging); err != nil { // nothing is there
				t.Errorf("unstage: %v", err)
			}
			back()
			if got, err := n.GetClaim(v.ID); err != nil || got.Spec.Size != r.Spec.Size {
				t.Errorf("the volume has %d bytes now: %v", got.Spec.Size, err)
			}
			end()
			n.mustEnd(v)
		})
	}
}

// TestSwappedMeanwhile exchanges a directory and a link all the time, while a volume is
// published and unpublished. Only the mount that is proven to be the volume's may be
// unmounted.
func TestSwappedMeanwhile(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("swapped", "ext4", 64*mib))
	r := n.publishRequest(v, "pod")
	n.mustPublishClaim(v, "pod")
	dir := filepath.Dir(r.Target)
	link := dir + ".link"
	outside, end := n.outside(r.Target)
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				if i%2 == 0 {
					return
				}
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	})
	published, refused := 0, 0
	for i := 0; (published < 30 || refused < 30) && i < 20_000; i++ {
		n.Unpublish(v.ID, r.Target)
		if err := n.PublishClaim(t.Context(), r); err == nil {
			published++
		} else {
			refused++
		}
	}
	close(stop)
	wg.Wait()
	t.Logf("%d times published, %d times refused", published, refused)
	if published < 30 || refused < 30 {
		t.Error("the exchange hardly ever hit a call")
	}
	end()
	n.mustEnd(v, "pod")
}
