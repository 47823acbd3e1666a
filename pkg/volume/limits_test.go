// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/quota"
)

// again is the same node with the Manager of another process.
func (n *node) again(limits quota.Limits) *node {
	n.t.Helper()
	m, err := NewManager(Config{Pool: n.pool, Templates: n.contents.templates, TargetRoot: n.kubelet, Limits: limits})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { m.Close() })
	return &node{m, n.t, n.kubelet}
}

// of is a request for a small volume for a pod of a namespace.
func (n *node) of(namespace, id string) InlineRequest {
	r := n.request(id, "ext4", 64*mib)
	r.Pod.Namespace = namespace
	return r
}

// mustRefuse publishes a volume, which must fail and leave nothing.
func (n *node) mustRefuse(r InlineRequest, want error, says ...string) {
	n.t.Helper()
	_, err := n.PublishInline(n.t.Context(), r)
	n.t.Log(err)
	if !errors.Is(err, want) {
		n.t.Errorf("%s: %v, not %v", r.ID, err, want)
	}
	for _, s := range says {
		if err == nil || !strings.Contains(err.Error(), s) {
			n.t.Errorf("%s: does not say %s: %v", r.ID, s, err)
		}
	}
	for _, path := range []string{n.pool.Volume(r.ID), r.Target} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			n.t.Errorf("%s is there: %v", path, err)
		}
	}
}

func TestInlineLimits(t *testing.T) {
	limits := quota.Limits{Size: 100 * mib, Volumes: 3, VolumesPerNamespace: 2}
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, gib, Config{Limits: limits})
			n.mustRefuse(n.request("large", "ext4", 101*mib), diskfs.ErrOutOfRange, "size", "101Mi", "100Mi", "--max-inline-size")
			if locks, err := filepath.Glob(filepath.Join(n.pool.Root(), "locks", "ext4-*")); err != nil || len(locks) > 0 {
				t.Errorf("a template was locked for a volume that is too large: %v %v", locks, err)
			}
			a, b, c := n.of("shop", "a"), n.of("shop", "b"), n.of("shop", "c")
			n.mustPublish(a)
			n.mustPublish(b)
			n.mustRefuse(c, errdefs.ErrLimit, "--max-inline-volumes-per-namespace 2", `"shop" has 2`)
			d, e := n.of("bank", "d"), n.of("bank", "e")
			n.mustPublish(d)
			n.mustRefuse(e, errdefs.ErrLimit, "--max-inline-volumes 3", "has 3", "1 of them", `"bank"`)
			v := n.mustCreate(claim("claim", "ext4", 128*mib)) // claims are not counted
			n.mustPublish(a)
			n.mustUnpublish(b)
			n.mustPublish(c)
			n.mustRefuse(b, errdefs.ErrLimit, "--max-inline-volumes-per-namespace")
			n.mustUnpublish(c)

			// A volume that fails, before or after it has its name, is counted no longer.
			templates := n.contents.templates
			gone := errors.New("mkfs is gone")
			n.contents.templates = template.NewStore(template.Config{Pool: n.pool, Fingerprint: func(diskfs.Spec) (string, error) { return "", gone }})
			other := n.of("shop", "other")
			other.Spec.Size = 65 * mib
			n.mustRefuse(other, gone)
			n.contents.templates.Close()
			n.contents.templates = templates
			parent := filepath.Dir(b.Target)
			testenv.Run(t, "mount", "-t", "tmpfs", "-o", "ro", "test", parent)
			n.mustRefuse(b, syscall.EROFS)
			testenv.Run(t, "umount", parent)
			n.mustPublish(b)
			n.mustRefuse(c, errdefs.ErrLimit)

			// Another process counts the volumes that exist, and leaves them alone.
			limits := limits
			limits.Volumes, limits.Size = 1, mib
			later := n.again(limits)
			later.mustRefuse(c, diskfs.ErrOutOfRange)
			limits.Size = 0
			later = n.again(limits)
			later.mustRefuse(c, errdefs.ErrLimit, "per-namespace", "has 2")
			later.mustRefuse(e, errdefs.ErrLimit, "--max-inline-volumes 1", "has 3")
			if res := later.mustPublish(a); !res.Existed {
				t.Error("a volume was made anew")
			}
			for _, r := range []InlineRequest{a, b, d} {
				later.mustUnpublish(r)
			}
			later.mustPublish(e)
			later.mustUnpublish(e)
			later.mustDelete(v.ID)
		})
	}
}

// TestRecount changes the pool without telling the ledger.
func TestRecount(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, gib, Config{Limits: quota.Limits{BytesPerNamespace: 100 * mib}})
	recount := func() {
		t.Helper()
		if err := n.quota.Recount(); err != nil {
			t.Fatal(err)
		}
	}
	strange := n.pool.Volume("not-ours")
	if err := os.WriteFile(strange, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, next := n.of("shop", "by-hand"), n.of("shop", "next")
	img, err := n.newImage(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.images.Link(img); err != nil {
		t.Fatal(err)
	}
	img.Close()
	recount()
	n.mustRefuse(next, errdefs.ErrLimit, "--max-inline-bytes-per-namespace", "100Mi", "has 64Mi", "64Mi more")
	if err := os.Remove(n.pool.Volume(r.ID)); err != nil {
		t.Fatal(err)
	}
	n.mustRefuse(next, errdefs.ErrLimit)
	recount()
	// A volume that is being made has no name yet, and still counts.
	release, err := n.quota.Reserve("half-made", "shop", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	recount()
	n.mustRefuse(next, errdefs.ErrLimit)
	release()
	n.mustPublish(next)
	recount()
	n.mustRefuse(r, errdefs.ErrLimit)
	n.mustUnpublish(next)
	if err := os.Remove(strange); err != nil {
		t.Error(err)
	}
}

// TestLimitsAtOnce publishes many more volumes at once than the limit allows, while the pool
// is counted again and again.
func TestLimitsAtOnce(t *testing.T) {
	const most = 5
	for name, limits := range map[string]quota.Limits{
		"volumes":                  {Volumes: most},
		"volumes of one namespace": {VolumesPerNamespace: most},
		"bytes":                    {Bytes: most*64*mib + 1},
		"bytes of one namespace":   {BytesPerNamespace: most * 64 * mib},
	} {
		for _, kind := range testenv.PoolKinds {
			t.Run(kind.Name+"/"+name, func(t *testing.T) {
				n := newNodeWith(t, kind, gib, Config{Limits: limits})
				for round := range 2 { // in the second round all volumes of the first are gone
					var mu sync.Mutex
					var made []InlineRequest
					var all sync.WaitGroup
					stop, counted := make(chan struct{}), make(chan error)
					go func() {
						var err error
						for {
							err = errors.Join(err, n.quota.Recount())
							select {
							case <-stop:
								counted <- err
								return
							default:
							}
						}
					}()
					for i := range 16 {
						r := n.of("shop", fmt.Sprintf("v-%d-%d", round, i))
						all.Go(func() {
							_, err := n.PublishInline(t.Context(), r)
							switch {
							case err == nil:
								mu.Lock()
								made = append(made, r)
								mu.Unlock()
							case !errors.Is(err, errdefs.ErrLimit):
								t.Error(err)
							}
						})
					}
					all.Wait()
					close(stop)
					if err := <-counted; err != nil {
						t.Error(err)
					}
					if len(made) != most {
						t.Errorf("round %d: %d volumes, not %d", round, len(made), most)
					}
					for _, r := range made {
						n.mustUnpublish(r)
					}
				}
			})
		}
	}
}
