// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// rawDisk makes a sparse raw disk with data at its beginning, in its middle and at its end.
func rawDisk(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, 1<<20)
	rand.New(rand.NewSource(1)).Read(data)
	err = f.Truncate(size)
	for _, at := range []int64{0, size / 2 &^ 0xfffff, size - 1<<20} {
		_, e := f.WriteAt(data, at)
		err = errors.Join(err, e)
	}
	// Zeros that are written are data for the filesystem.
	_, e := f.WriteAt(make([]byte, 1<<20), 2<<20)
	if err := errors.Join(err, e); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func unnamed(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := create(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func allocated(t *testing.T, f *os.File) int64 {
	t.Helper()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// same compares two files as qemu-img does, which skips holes.
func same(t *testing.T, want string, got *os.File) {
	t.Helper()
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), got.Fd())
	testenv.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, path)
}

func fails(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	t.Log(err)
	if !errors.Is(err, kind) {
		t.Errorf("the error is not of the kind %q: %v", kind, err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error lacks %q: %v", w, err)
		}
	}
	for _, fault := range plain.Faults(err.Error()) {
		t.Errorf("%s: %v", fault, err)
	}
}

// runQemuImg runs qemu-img on paths in a directory.
func runQemuImg(t *testing.T, args ...string) { t.Helper(); testenv.Run(t, "qemu-img", args...) }

// TestConvert converts disks as qemu-img makes them.
func TestConvert(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) { testConvert(t, kind.Pool(t)) })
	}
}

func testConvert(t *testing.T, dir string) {
	const size = 64<<20 + 512 // not of whole blocks of 4 KiB
	raw := filepath.Join(dir, "raw")
	rawDisk(t, raw, size)
	make := func(name string, args ...string) string {
		to := filepath.Join(dir, name)
		runQemuImg(t, append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), raw, to)...)
		return to
	}
	snapshots := make("snapshots")
	runQemuImg(t, "snapshot", "-c", "one", snapshots)
	runQemuImg(t, "snapshot", "-c", "two", snapshots)
	for name, path := range map[string]string{
		"raw":         raw,
		"qcow2":       make("qcow2"),
		"compressed":  make("compressed", "-c"),
		"zstd":        make("zstd", "-c", "-o", "compression_type=zstd"),
		"version 2":   make("v2", "-o", "compat=0.10"),
		"small":       make("small", "-o", "cluster_size=512"),
		"large":       make("large", "-o", "cluster_size=2M"),
		"extended L2": make("l2", "-o", "extended_l2=on"),
		"snapshots":   snapshots,
	} {
		t.Run(name, func(t *testing.T) {
			src := open(t, path)
			format, virtual, err := Inspect(src)
			if err != nil || virtual != size {
				t.Fatalf("it is %s of %d bytes: %v", format, virtual, err)
			}
			dst := unnamed(t, dir)
			if err := Convert(t.Context(), dst, src, format); err != nil {
				t.Fatal(err)
			}
			same(t, raw, dst)
			if n := allocated(t, dst); n > 8<<20 { // xfs allocates a bit ahead
				t.Errorf("it takes %d bytes", n)
			}
			if fi, err := dst.Stat(); err != nil || fi.Size() != size {
				t.Errorf("it is %d bytes large: %v", fi.Size(), err)
			}
		})
	}
	testenv.NoLoopsBelow(t, dir)
}

// TestConvertLarge: what takes time is the data, and not the size.
func TestConvertLarge(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	raw := filepath.Join(dir, "raw")
	rawDisk(t, raw, 1<<40)
	qcow2 := filepath.Join(dir, "qcow2")
	runQemuImg(t, "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
	for path, want := range map[string]Format{raw: Raw, qcow2: Qcow2} {
		src, dst := open(t, path), unnamed(t, dir)
		format, virtual, err := Inspect(src)
		if err != nil || format != want || virtual != 1<<40 {
			t.Fatalf("it is %s of %d bytes: %v", format, virtual, err)
		}
		if err := Convert(t.Context(), dst, src, format); err != nil {
			t.Fatal(err)
		}
		if n := allocated(t, dst); n > 8<<20 {
			t.Errorf("the %s takes %d bytes", format, n)
		}
		same(t, raw, dst)
	}
}

// TestRefused has disks of qemu-img that are refused.
func TestRefused(t *testing.T) {
	dir := testenv.Dir(t)
	raw := filepath.Join(dir, "raw")
	rawDisk(t, raw, 8<<20)
	in := func(name string) string { return filepath.Join(dir, name) }
	for name, tc := range map[string]struct {
		args  []string
		words string
	}{
		"backing": {[]string{"create", "-f", "qcow2", "-b", raw, "-F", "raw", in("backing")}, "backing file"},
		"secret": {[]string{"create", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", in("secret"), "1M"},
			"backing file"},
		"data": {[]string{"create", "-f", "qcow2", "-o", "data_file=" + in("data.raw"), in("data"), "8M"},
			"another file"},
		"vmdk":      {[]string{"convert", "-O", "vmdk", raw, in("vmdk")}, "VMDK"},
		"flat":      {[]string{"convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, in("flat")}, "VMDK"},
		"vdi":       {[]string{"convert", "-O", "vdi", raw, in("vdi")}, "VDI"},
		"vhdx":      {[]string{"convert", "-O", "vhdx", raw, in("vhdx")}, "VHDX"},
		"vpc":       {[]string{"convert", "-O", "vpc", raw, in("vpc")}, "VHD"},
		"fixed":     {[]string{"convert", "-O", "vpc", "-o", "subformat=fixed", raw, in("fixed")}, "VHD"},
		"qed":       {[]string{"convert", "-O", "qed", raw, in("qed")}, "QED"},
		"qcow":      {[]string{"convert", "-O", "qcow", raw, in("qcow")}, "version 1"},
		"parallels": {[]string{"convert", "-O", "parallels", raw, in("parallels")}, "Parallels"},
		"huge":      {[]string{"create", "-f", "qcow2", in("huge"), "32T"}, "16Ti"},
	} {
		t.Run(name, func(t *testing.T) {
			runQemuImg(t, tc.args...)
			src := open(t, in(name))
			_, _, err := Inspect(src)
			fails(t, err, ErrUnusable, tc.words)
			fails(t, Convert(t.Context(), unnamed(t, dir), src, Qcow2), ErrUnusable)
		})
	}
}

// TestCagedConvert gives qemu-img what Inspect would refuse. The cage has no other file.
func TestCagedConvert(t *testing.T) {
	dir := testenv.Dir(t)
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 1<<18), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, backing := range map[string]string{
		"file": secret, "json": `json:{"driver":"raw","file":{"driver":"file","filename":"` + secret + `"}}`,
		"network": "nbd://127.0.0.1/x", "device": "/dev/loop-control",
	} {
		t.Run(name, func(t *testing.T) {
			hostile, dst := filepath.Join(dir, name), unnamed(t, dir)
			runQemuImg(t, "create", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", hostile, "1M")
			err := convertQcow2(t.Context(), dst, open(t, hostile), 1<<20)
			fails(t, err, ErrFailed, "qemu-img")
			b, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", dst.Fd()))
			if err != nil || bytes.Contains(b, []byte("secret")) {
				t.Errorf("the disk has the secret: %v", err)
			}
		})
	}
	testenv.NoLoopsBelow(t, dir)
}

// TestConvertFails has what goes wrong while a disk is converted.
func TestConvertFails(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	raw, qcow2 := filepath.Join(dir, "raw"), filepath.Join(dir, "qcow2")
	rawDisk(t, raw, 64<<20)
	runQemuImg(t, "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for path, format := range map[string]Format{raw: Raw, qcow2: Qcow2} {
		if err := Convert(ctx, unnamed(t, dir), open(t, path), format); !errors.Is(err, context.Canceled) {
			t.Errorf("converting the %s when nobody waits: %v", format, err)
		}
	}

	b, err := os.ReadFile(qcow2)
	if err != nil {
		t.Fatal(err)
	}
	for _, missing := range []int{64 << 10, len(b) / 2} {
		t.Run(fmt.Sprintf("without the last %d bytes", missing), func(t *testing.T) {
			cut := filepath.Join(dir, "cut")
			if err := os.WriteFile(cut, b[:len(b)-missing], 0o600); err != nil {
				t.Fatal(err)
			}
			fails(t, Convert(t.Context(), unnamed(t, dir), open(t, cut), Qcow2), ErrFailed, "truncated")
		})
	}
	t.Run("full", func(t *testing.T) {
		large := filepath.Join(testenv.Dir(t), "large")
		random, err := os.Create(large)
		if err == nil {
			_, err = io.CopyN(random, rand.New(rand.NewSource(2)), 600<<20)
		}
		if err := errors.Join(err, random.Close()); err != nil {
			t.Fatal(err)
		}
		fails(t, Convert(t.Context(), unnamed(t, dir), open(t, large), Raw), pool.ErrFull, "enlarge the pool")
		runQemuImg(t, "convert", "-f", "raw", "-O", "qcow2", large, large+".qcow2")
		fails(t, Convert(t.Context(), unnamed(t, dir), open(t, large+".qcow2"), Qcow2), pool.ErrFull, "enlarge the pool")

		// Nobody waits any longer while qemu-img works.
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		err = Convert(ctx, unnamed(t, filepath.Dir(large)), open(t, large+".qcow2"), Qcow2)
		fails(t, err, context.DeadlineExceeded)
		testenv.NoLoopsBelow(t, filepath.Dir(large))
	})
	t.Run("no qemu-img", func(t *testing.T) {
		dirs := cage.ProgramDirs
		cage.ProgramDirs = nil
		defer func() { cage.ProgramDirs = dirs }()
		t.Setenv("PATH", "/nonexistent")
		fails(t, Convert(t.Context(), unnamed(t, dir), open(t, qcow2), Qcow2), cage.ErrNoProgram, "qemu-utils")
	})
	testenv.NoLoopsBelow(t, dir)
}

// TestFindSparse: an archive can say of a few bytes that they are a large file with a hole.
func TestFindSparse(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	if err := os.Mkdir(filepath.Join(dir, "disk"), 0o700); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(dir, "disk", "raw")
	rawDisk(t, raw, 1<<30)
	for _, format := range []string{"gnu", "posix"} {
		archive := filepath.Join(dir, format)
		testenv.Run(t, "tar", "--sparse", "--format", format, "-C", dir, "-cf", archive, "disk")
		_, _, err := Find(t.Context(), dir, 512<<20, open(t, archive))
		fails(t, err, ErrUnusable, "/disk/raw", "more bytes")
		f, _, err := Find(t.Context(), dir, 2<<30, open(t, archive))
		if err != nil {
			t.Fatal(err)
		}
		same(t, raw, f)
		if n := allocated(t, f); n > 8<<20 {
			t.Errorf("it takes %d bytes", n)
		}
		f.Close()
	}
}

// TestContainerDisk goes the way from an image to a raw disk.
func TestContainerDisk(t *testing.T) {
	dir := testenv.Btrfs.Pool(t)
	if err := os.Mkdir(filepath.Join(dir, "disk"), 0o700); err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(dir, "raw")
	rawDisk(t, raw, 32<<20)
	runQemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", raw, filepath.Join(dir, "disk", "vm.qcow2"))
	testenv.Run(t, "tar", "-C", dir, "-cf", filepath.Join(dir, "layer"), "disk")
	src, name, err := Find(t.Context(), dir, 1<<30, open(t, filepath.Join(dir, "layer")))
	if err != nil || name != "/disk/vm.qcow2" {
		t.Fatalf("found %s: %v", name, err)
	}
	defer src.Close()
	format, virtual, err := Inspect(src)
	if err != nil || format != Qcow2 || virtual != 32<<20 {
		t.Fatalf("it is %s of %d bytes: %v", format, virtual, err)
	}
	dst := unnamed(t, dir)
	if err := Convert(t.Context(), dst, src, format); err != nil {
		t.Fatal(err)
	}
	same(t, raw, dst)
}

// TestNotStarted has a qemu-img that cannot be started. That says nothing about the disk.
func TestNotStarted(t *testing.T) {
	tool := &qemuImg{program: "/nothing", patience: time.Minute}
	err := tool.check(t.Context(), "/dev/null")
	if !errors.Is(err, ErrFailed) || strings.Contains(err.Error(), "damaged") {
		t.Errorf("without a program: %v", err)
	}
}
