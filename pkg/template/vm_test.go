// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// realStore returns a store that formats in a VM.
func realStore(t testing.TB, p *pool.Pool, bin string, count func()) *Store {
	t.Helper()
	formatter, err := vmformat.New(vmformat.Config{Init: bin, CacheDir: p.CacheDir()})
	if err != nil {
		t.Fatal(err)
	}
	return newStore(t, p, func(c *Config) {
		c.Fingerprint = func(spec diskfs.Spec) (string, error) { return formatter.Fingerprint(spec, nil) }
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			count()
			r, err := formatter.Format(ctx, f, spec, nil, nil)
			return Provenance{Fingerprint: r.Fingerprint, UUID: r.UUID}, err
		}
	})
}

// Environment of a process that TestManyCallersOneVM starts.
const (
	envPool   = "TEST_TEMPLATE_POOL"
	envBinary = "TEST_TEMPLATE_BINARY"
)

// TestManyCallersOneVM has 16 callers in 4 processes miss the same template.
func TestManyCallersOneVM(t *testing.T) {
	if dir := os.Getenv(envPool); dir != "" {
		fourCallers(t, dir)
		return
	}
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			p := newPool(t, kind)
			bin := testenv.Binary(t)
			outs := make([]strings.Builder, 4)
			var wg sync.WaitGroup
			for i := range outs {
				wg.Go(func() {
					cmd := exec.Command(os.Args[0], "-test.run=^TestManyCallersOneVM$", "-test.v")
					cmd.Env = append(os.Environ(), envPool+"="+p.Root(), envBinary+"="+bin)
					cmd.Stdout, cmd.Stderr = &outs[i], &outs[i]
					if err := cmd.Run(); err != nil {
						t.Errorf("process %d: %v\n%s", i, err, outs[i].String())
					}
				})
			}
			wg.Wait()
			vms, callers := 0, 0
			for i := range outs {
				vms += strings.Count(outs[i].String(), "VM booted")
				callers += strings.Count(outs[i].String(), "caller served")
			}
			if vms != 1 || callers != 16 {
				t.Errorf("%d VMs booted for %d callers, want 1 for 16", vms, callers)
			}
		})
	}
}

func fourCallers(t *testing.T, dir string) {
	p, err := pool.Open(t.Context(), pool.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	s := realStore(t, p, os.Getenv(envBinary), func() { fmt.Println("VM booted") })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			tmpl, err := s.Ensure(t.Context(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			tmpl.Close()
			fmt.Println("caller served")
		})
	}
	wg.Wait()
}

// TestManySizes asks for 12 sizes of every filesystem at once. A few VMs build them all, each as it was
// asked for.
func TestManySizes(t *testing.T) {
	p := newPool(t, testenv.XFS)
	formatter, err := vmformat.New(vmformat.Config{Init: testenv.Binary(t), CacheDir: testenv.CacheDir(t), Save: true})
	if err != nil {
		t.Fatal(err)
	}
	var vms sync.Map
	s := newStore(t, p, func(c *Config) {
		c.MaxBuilds = 2 * vmformat.MaxOrders
		c.Fingerprint = func(spec diskfs.Spec) (string, error) { return formatter.Fingerprint(spec, nil) }
		c.Format = func(ctx context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
			r, err := formatter.Format(ctx, f, spec, nil, nil)
			vms.Store(r.Elapsed, true) // no two VMs take the same time to the nanosecond
			return Provenance{Fingerprint: r.Fingerprint, UUID: r.UUID}, err
		}
	})
	const sizes = 12
	var wg sync.WaitGroup
	for i := range sizes {
		for _, fs := range diskfs.Names() {
			spec := diskfs.Spec{Filesystem: fs, Size: int64(300+i) << 20}
			wg.Go(func() {
				tmpl, err := s.Ensure(t.Context(), spec)
				if err != nil {
					t.Error(err)
					return
				}
				defer tmpl.Close()
				if tmpl.Hit || !tmpl.Spec.Equal(spec) {
					t.Errorf("%s: there already: %v; it is %s", spec, tmpl.Hit, tmpl.Spec)
				}
			})
		}
	}
	wg.Wait()
	used := 0
	vms.Range(func(any, any) bool { used++; return true })
	templates, err := p.Templates()
	if err != nil || len(templates) != sizes*len(diskfs.Names()) {
		t.Errorf("%d templates are there: %v", len(templates), err)
	}
	if t.Logf("%d VMs built %d templates", used, len(templates)); used > len(templates)/3 {
		t.Errorf("%d VMs built %d templates", used, len(templates))
	}
	for _, i := range []int{0, sizes - 1} {
		for _, fs := range diskfs.Names() {
			tmpl, err := s.Ensure(t.Context(), diskfs.Spec{Filesystem: fs, Size: int64(300+i) << 20})
			if err != nil {
				t.Fatal(err)
			}
			testenv.Fsck(t, fs, p.Template(tmpl.Key))
			tmpl.Close()
		}
	}
}

// BenchmarkClone clones templates of every filesystem, size and kind of pool. That is one step of
// making a volume.
func BenchmarkClone(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		p := newPool(b, kind)
		s := realStore(b, p, testenv.Binary(b), func() {})
		for _, fs := range diskfs.Names() {
			for _, size := range []int64{1 << 30, 100 << 30} {
				b.Run(fmt.Sprintf("%s-pool/%s-%dGiB", kind.Name, fs, size>>30), func(b *testing.B) {
					tmpl, err := s.Ensure(b.Context(), diskfs.Spec{Filesystem: fs, Size: size})
					if err != nil {
						b.Fatal(err)
					}
					defer tmpl.Close()
					extents, err := fiemap.Count(tmpl.File)
					if err != nil {
						b.Fatal(err)
					}
					b.ReportMetric(float64(extents), "extents")
					for b.Loop() {
						f, err := p.NewVolume()
						if err != nil {
							b.Fatal(err)
						}
						if err := reflink.Clone(f, tmpl.File); err != nil {
							b.Fatal(err)
						}
						f.Close()
					}
				})
			}
		}
	}
}
