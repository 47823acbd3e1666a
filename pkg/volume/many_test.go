// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// copyClaim gives a node many copies of a claim, behind its back: nothing is added up. It returns
// their ids.
func (n *node) copyClaim(v image.Record, copies int) []string {
	n.t.Helper()
	src, err := n.images.Open(v.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	defer src.Close()
	var ids []string
	for i := range copies {
		v.ID = fmt.Sprintf("copy-%05d", i)
		v.Name = v.ID
		f, err := n.images.New()
		if err == nil {
			err = reflink.Clone(f, src.File)
		}
		if err == nil {
			_, err = n.images.Describe(f, v)
		}
		if err == nil {
			err = tmpfile.Link(f, n.pool.Volume(v.ID))
		}
		if err != nil {
			n.t.Fatal(err)
		}
		f.Close()
		ids = append(ids, v.ID)
	}
	if err := n.pool.Sync(); err != nil {
		n.t.Fatal(err)
	}
	return ids
}

// TestSweepCorrectsPromises adds and removes claims behind the plugin's back. Until the next sweep
// they count with the space that they take, or as if they were there.
func TestSweepCorrectsPromises(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			available := func() int64 {
				t.Helper()
				left, err := n.Available(image.Thin)
				if err != nil {
					t.Fatal(err)
				}
				return left
			}
			first := n.mustCreate(disk("first", 100*mib))
			before := available()
			ids := n.copyClaim(first, 5)
			if left := available(); left < before-mib {
				t.Errorf("before a sweep %d MiB are available, and were %d", left/mib, before/mib)
			}
			out := testenv.CaptureLog(t, "0")
			for _, there := range []bool{true, false} {
				want := before
				if there {
					want -= 500 * mib
				}
				n.mustSweep(sweep.Options{})
				if left := available(); left < want-mib || left > want+mib {
					t.Errorf("after a sweep %d MiB are available, not %d", left/mib, want/mib)
				}
				klog.Flush()
				if !strings.Contains(out.String(), "counted wrongly") || !strings.Contains(out.String(), "images=5") {
					t.Errorf("the log is %s", out)
				}
				out.Reset()
				if there {
					for _, id := range ids {
						if err := os.Remove(n.pool.Volume(id)); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			n.mustSweep(sweep.Options{})
			klog.Flush()
			if strings.Contains(out.String(), "counted wrongly") {
				t.Errorf("the log is %s", out)
			}
			n.mustDelete(first.ID)
		})
	}
}

// TestChangedRecords changes a record that the plugin remembers, several times within one tick of
// the kernel's clock. Each list has what the record says at that time.
func TestChangedRecords(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			v := n.mustCreate(disk("v", mib))
			path := n.pool.Volume(v.ID)
			for round := range 3 {
				time.Sleep(100 * time.Millisecond) // the record is remembered if it is this old
				for i := range int64(20) {
					size := (1 + i + 20*int64(round)) * mib
					v.Spec.Size = size
					record, err := json.Marshal(v)
					if err != nil {
						t.Fatal(err)
					}
					setRecord(t, path, string(record))
					for range 2 {
						all, _, err := n.ListClaims("", 0)
						if err != nil || len(all) != 1 || all[0].Spec.Size != size {
							t.Fatalf("round %d, change %d: %+v, not a claim of %d bytes: %v", round, i, all, size, err)
						}
					}
				}
			}
			time.Sleep(100 * time.Millisecond)
			for range 2 { // a record that is remembered is that of this file, and of no other with the name
				if _, err := n.GetClaim(v.ID); err != nil {
					t.Error(err)
				}
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if _, err := n.GetClaim(v.ID); !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("a claim whose image is gone: %v", err)
			}
		})
	}
}

// TestHealthByPages lists the claims that have something wrong with them, by pages of every length.
func TestHealthByPages(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	var want, all []string
	for i := range 9 {
		v := n.mustCreate(disk(fmt.Sprint("v-", i), mib))
		if all = append(all, v.ID); i%3 == 1 {
			mustTruncate(t, n.pool.Volume(v.ID), 0)
			want = append(want, v.ID)
		}
	}
	for limit := range 5 {
		var got []string
		for after := ""; ; {
			page, next, err := n.ListHealth(after, limit)
			if err != nil || limit > 0 && len(page) > limit {
				t.Fatalf("by %d: %+v: %v", limit, page, err)
			}
			for _, v := range page {
				if got = append(got, v.ID); len(v.Conditions) != 1 || v.Conditions[0].Code != "BackingImageTruncated" {
					t.Errorf("%s: %+v", v.ID, v.Conditions)
				}
			}
			if after = next; after == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("by %d: %v, not %v", limit, got, want)
		}
	}
	n.mustDelete(all...)
}

// BenchmarkRecord reads a record for the first time, and once more.
func BenchmarkRecord(b *testing.B) {
	n := newNode(b, testenv.XFS, gib)
	v := n.mustCreate(disk("v", mib))
	time.Sleep(100 * time.Millisecond)
	for _, again := range []bool{false, true} {
		b.Run(fmt.Sprintf("again-%v", again), func(b *testing.B) {
			for b.Loop() {
				images := n.images
				if !again {
					images = image.NewStore(n.pool)
				}
				if _, err := images.GetClaim(v.ID); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	n.mustDelete(v.ID)
}

// BenchmarkMany measures calls on a node with few claims, and on one with 10,000.
func BenchmarkMany(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		n := newNodeWith(b, kind, 64*gib, Config{Overcommit: 1000, Headroom: size.Share{Percent: 5}})
		first := n.mustCreate(claim("first", "ext4", gib))
		for _, claims := range []int{10, 10000} {
			ids := n.copyClaim(first, claims)
			bench := func(name string, call func() error) {
				b.Run(fmt.Sprintf("%s-pool/%d-claims/%s", kind.Name, claims, name), func(b *testing.B) {
					for b.Loop() {
						if err := call(); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
			b.Run(fmt.Sprintf("%s-pool/%d-claims/create", kind.Name, claims), func(b *testing.B) {
				for b.Loop() {
					v := n.mustCreate(claim("bench", "ext4", gib))
					b.StopTimer()
					n.mustDelete(v.ID)
					b.StartTimer()
				}
			})
			bench("capacity", func() error {
				_, err := n.Available(image.Thin)
				return err
			})
			bench("list", func() error {
				all, _, err := n.ListClaims("", 0)
				if err == nil && len(all) != claims+1 {
					err = fmt.Errorf("%d were listed", len(all))
				}
				return err
			})
			bench("list-for-people", func() error {
				_, err := n.List()
				return err
			})
			bench("list-page-of-100", func() error {
				_, _, err := n.ListClaims("copy-00003", 100)
				return err
			})
			bench("sweep", func() error {
				_, err := n.Sweep(b.Context(), sweep.Options{})
				return err
			})
			bench("census", func() error { // as it is in the background, once a minute at most
				_, err := n.count()
				return err
			})
			bench("metrics", func() error { // as they are for a scrape
				_, err := n.Census()
				_, e := n.Promises()
				return errors.Join(err, e)
			})
			bench("restart", func() error {
				m, err := NewManager(Config{Pool: n.pool, Templates: n.contents.templates, TargetRoot: n.kubelet})
				if err == nil {
					err = m.Close()
				}
				return err
			})
			for _, id := range ids {
				if err := n.images.Remove(id); err != nil {
					b.Fatal(err)
				}
			}
		}
		n.mustDelete(first.ID)
	}
}
