// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// fillings are contents to measure with. Each calls add for its files.
var fillings = map[string]func(r *rand.Rand, add func(name string, size int)){
	"node_modules": func(r *rand.Rand, add func(string, int)) { // 20,000 small files
		for i := range 20_000 {
			add(fmt.Sprintf("node_modules/%d/lib/%d/%d.js", i/1000, i/50, i), r.IntN(8<<10))
		}
	},
	"database": func(r *rand.Rand, add func(string, int)) { // few large files and some small ones
		for i := range 400 {
			add(fmt.Sprintf("base/%d/%d", i/100, i), 8<<10*(1+r.IntN(1<<r.IntN(10))))
		}
		add("base/large", 256<<20)
	},
	"tree": func(_ *rand.Rand, add func(string, int)) { // the names and sizes of this machine's programs
		for _, dir := range []string{"/usr/bin", "/usr/local"} {
			filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if fi, err := d.Info(); err == nil {
						add(path, int(fi.Size()))
					}
				}
				return nil
			})
		}
	},
}

// archiveOf writes the tar of a filling to a file without a name.
func archiveOf(t testing.TB, dir string, filling func(*rand.Rand, func(string, int))) *vmformat.Fill {
	t.Helper()
	f, err := tmpfile.Create(dir, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fill := &vmformat.Fill{Content: guest.Content{Digest: "sha256:test"}, Archive: f}
	w := tar.NewWriter(f)
	noise := make([]byte, 1<<20)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	filling(r, func(name string, size int) {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)})
		for at := 0; at < size && err == nil; at += len(noise) {
			_, err = io.Copy(w, bytes.NewReader(noise[:min(len(noise), size-at)]))
		}
		if err != nil {
			t.Fatal(err)
		}
		fill.Entries++
		fill.Bytes += int64(size)
	})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	end, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		t.Fatal(err)
	}
	fill.Layers = []guest.Layer{{Length: end}}
	return fill
}

// BenchmarkPack fills templates of 10 GiB in a VM, and packs them. It shows the numbers of extents and the
// space before and after, what the unpacking and the packing take, and what a clone takes.
func BenchmarkPack(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		p, err := pool.Open(b.Context(), pool.Config{Dir: filepath.Join(testenv.Mount(b, 8<<30, map[string][]string{
			"xfs": {"mkfs.xfs", "-q", "-s", "size=4096"}, "btrfs": {"mkfs.btrfs", "-q"},
		}[kind.Name]...), "pool")})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { p.Close() })
		formatter, err := vmformat.New(vmformat.Config{Init: testenv.Binary(b), CacheDir: testenv.CacheDir(b)})
		if err != nil {
			b.Fatal(err)
		}
		for name, filling := range fillings {
			fill := archiveOf(b, testenv.Dir(b), filling)
			for _, fs := range diskfs.Names() {
				b.Run(kind.Name+"/"+name+"/"+fs, func(b *testing.B) {
					for b.Loop() {
						measurePack(b, p, formatter, fill, diskfs.Spec{Filesystem: fs, Size: 10 << 30})
					}
				})
			}
		}
	}
}

func measurePack(b *testing.B, p *pool.Pool, formatter *vmformat.Formatter, fill *vmformat.Fill, spec diskfs.Spec) {
	f, err := p.NewTemplate()
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	report, err := formatter.Format(b.Context(), f, spec, fill, nil)
	if err != nil {
		b.Fatal(err)
	}
	before, err := digest(f)
	if err != nil {
		b.Fatal(err)
	}
	had, err := fiemap.Count(f)
	if err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	packed, has, err := pack(b.Context(), p.NewTemplate, f)
	if err != nil {
		b.Fatal(err)
	}
	took := time.Since(start)
	if packed != f {
		defer packed.Close()
	}
	if err := packed.Sync(); err != nil {
		b.Fatal(err)
	}
	if after, err := digest(packed); err != nil || after != before {
		b.Errorf("packing changed the digest: %v", err)
	}
	b.ReportMetric(float64(had), "extents")
	b.ReportMetric(float64(has), "packed-extents")
	b.ReportMetric(taken(b, f), "MiB")
	b.ReportMetric(taken(b, packed), "packed-MiB")
	b.ReportMetric(report.Unpack.Seconds(), "unpack-s")
	b.ReportMetric(report.Check.Seconds(), "check-s")
	b.ReportMetric(took.Seconds(), "pack-s")
	b.ReportMetric(cloneTime(b, p, f), "clone-ms")
	b.ReportMetric(cloneTime(b, p, packed), "packed-clone-ms")
	b.ReportMetric(0, "ns/op")
}

// taken is the space of a file in MiB.
func taken(b *testing.B, f *os.File) float64 {
	fi, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	return float64(fi.Sys().(*syscall.Stat_t).Blocks) / 2048
}

// cloneTime is what a clone takes, in ms: the least of some.
func cloneTime(b *testing.B, p *pool.Pool, f *os.File) float64 {
	least := time.Hour
	for range 5 {
		clone, err := p.NewVolume()
		if err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		err = reflink.Clone(clone, f)
		least = min(least, time.Since(start))
		clone.Close()
		if err != nil {
			b.Fatal(err)
		}
	}
	return float64(least.Microseconds()) / 1000
}
