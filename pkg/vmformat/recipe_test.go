// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

func TestCompareVersions(t *testing.T) {
	v := []string{"vmlinuz-6.1.0-9-amd64", "vmlinuz-6.10.0", "vmlinuz-6.1.0-56-amd64", "vmlinuz-5.10.0", "vmlinuz-6.1.0-056-amd64"}
	slices.SortStableFunc(v, compareVersions)
	want := "vmlinuz-5.10.0 vmlinuz-6.1.0-9-amd64 vmlinuz-6.1.0-56-amd64 vmlinuz-6.1.0-056-amd64 vmlinuz-6.10.0"
	if got := strings.Join(v, " "); got != want {
		t.Errorf("sorted as %s, want %s", got, want)
	}
}

func TestResolveModules(t *testing.T) {
	const builtin = "kernel/fs/ext4/ext4.ko\n"
	const dep = `kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio-ring.ko.xz
kernel/drivers/virtio/virtio-ring.ko.xz:
kernel/drivers/block/virtio_blk.ko.zst: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio-ring.ko.xz
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio-ring.ko.xz
`
	got, err := resolveModules([]string{"virtio_mmio", "virtio_blk", "ext4"}, builtin, dep)
	var names []string
	for _, p := range got {
		names = append(names, moduleName(p))
	}
	if err != nil || strings.Join(names, " ") != "virtio_ring virtio virtio_mmio virtio_blk" {
		t.Errorf("to be loaded: %q, %v", names, err)
	}
	if _, err := resolveModules([]string{"zfs"}, builtin, dep); err == nil || !strings.Contains(err.Error(), "zfs") {
		t.Errorf("zfs: %v", err)
	}
}

func TestReadModule(t *testing.T) {
	dir := t.TempDir()
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	w.Write([]byte("module"))
	w.Close()
	for name, packed := range map[string][]byte{"a.ko": []byte("module"), "a.ko.gz": zipped.Bytes()} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, packed, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := content(t, func() (*os.File, error) { return openModule(path) }); got != "module" {
			t.Errorf("%s: %q", name, got)
		}
	}
	for name, content := range map[string]string{"b.ko.xz": "no xz", "b.ko.zst": "no zstd", "b.ko.gz": "no gzip", "b.ko.lzo": ""} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openModule(path); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// content reads what a file of the archive contains, from its beginning.
func content(t testing.TB, open func() (*os.File, error)) string {
	t.Helper()
	f, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, fi.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// text is a file of the archive with the given content.
func text(t testing.TB, mode uint64, content string) file {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file{mode, name, func() (*os.File, error) { return os.Open(name) }}
}

// testRecipe returns a recipe that contains nothing of this machine.
func testRecipe(t testing.TB) *recipe {
	t.Helper()
	return &recipe{
		kernel: kernel{digest: "k"},
		files: map[string]file{
			"/bin/mkfs.ext4":     text(t, 0o555|cpio.S_IFREG, "mkfs"),
			"/lib/libc.so.6":     text(t, 0o555|cpio.S_IFREG, "libc"),
			"/modules/virtio.ko": text(t, 0o444|cpio.S_IFREG, "virtio"),
		},
		init:  map[string]file{"/init": text(t, 0o555|cpio.S_IFREG, "init")},
		setup: guest.Setup{Modules: []string{"/modules/virtio.ko"}},
	}
}

func TestInitramfs(t *testing.T) {
	var first, second bytes.Buffer
	r := testRecipe(t)
	base, err := r.initramfs(&first)
	if err != nil {
		t.Fatal(err)
	}
	if alone, err := r.baseDigest(); err != nil || alone != base {
		t.Errorf("the digest of what was packed is %s, and without packing %s: %v", base, alone, err)
	}
	if again, err := testRecipe(t).initramfs(&second); err != nil || again != base || !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Errorf("the archive is not reproducible: %v", err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(first.Bytes())))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range records {
		names = append(names, r.Name)
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 {
			t.Errorf("%s: time %d, owner %d:%d", r.Name, r.MTime, r.UID, r.GID)
		}
	}
	want := "bin lib modules bin/mkfs.ext4 lib/libc.so.6 modules/virtio.ko dev mnt proc sys init dev/console setup.json zz-complete"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("the archive contains %s, want %s", got, want)
	}
}

// TestFingerprint changes each thing that decides the bytes, one at a time.
func TestFingerprint(t *testing.T) {
	spec := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	var content *guest.Content
	of := func(spec diskfs.Spec, change func(*recipe)) string {
		r := testRecipe(t)
		if change != nil {
			change(r)
		}
		base, err := r.baseDigest()
		if err != nil {
			t.Fatal(err)
		}
		job, err := newJob(spec, content)
		if err != nil {
			t.Fatal(err)
		}
		return fingerprint(base, job)
	}
	base := of(spec, nil)
	if len(base) != 16 || base != of(spec, nil) {
		t.Errorf("the fingerprint is %q", base)
	}
	label, option, size := spec, spec, spec
	label.Label, size.Size = "x", 65<<20
	option.Options = map[string]string{"inode-size": "512"}
	filled := func(c guest.Content) string {
		content = &c
		defer func() { content = nil }()
		return of(spec, nil)
	}
	id, group, mode := 0, int64(0), uint32(0o700)
	seen := map[string]string{base: "nothing"}
	for name, got := range map[string]string{
		"content":   filled(guest.Content{Digest: "sha256:a"}),
		"digest":    filled(guest.Content{Digest: "sha256:b"}),
		"owner":     filled(guest.Content{Digest: "sha256:a", UID: &id}),
		"group":     filled(guest.Content{Digest: "sha256:a", GID: &id}),
		"fsGroup":   filled(guest.Content{Digest: "sha256:a", FSGroup: &group}),
		"mode":      filled(guest.Content{Digest: "sha256:a", Mode: &mode}),
		"kernel":    of(spec, func(r *recipe) { r.kernel.digest = "other" }),
		"mkfs":      of(spec, func(r *recipe) { r.files["/bin/mkfs.ext4"] = text(t, 0o555, "other") }),
		"a library": of(spec, func(r *recipe) { r.files["/lib/libc.so.6"] = text(t, 0o555, "other") }),
		"a module":  of(spec, func(r *recipe) { r.files["/modules/virtio.ko"] = text(t, 0o444, "other") }),
		"one more":  of(spec, func(r *recipe) { r.files["/lib/new"] = text(t, 0o444, "") }),
		"label":     of(label, nil),
		"option":    of(option, nil),
		"size":      of(size, nil),
	} {
		if other, dup := seen[got]; dup {
			t.Errorf("a change of %s gives the same fingerprint as a change of %s", name, other)
		}
		seen[got] = name
	}
	if other := of(spec, func(r *recipe) { r.init["/init"] = text(t, 0o555, "another build") }); other != base {
		t.Error("another build of init gives another fingerprint")
	}
}

// TestProgramFiles compares the libraries that the ELF headers name with those of ldd.
func TestProgramFiles(t *testing.T) {
	program, err := exec.LookPath("ls")
	if err != nil {
		t.Fatal(err)
	}
	files, err := programFiles(program)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		name, rest, found := strings.Cut(strings.TrimSpace(line), " => ")
		if !found {
			continue
		}
		want, _, _ := strings.Cut(rest, " ")
		want, err := filepath.EvalSymlinks(want)
		if err != nil {
			t.Fatal(err)
		}
		if got := files[guest.LibDir+"/"+name]; got != want {
			t.Errorf("%s is %q, ldd says %q", name, got, want)
		}
	}
	if _, err := programFiles("/etc/passwd"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("/etc/passwd: %v, want ErrUnavailable", err)
	}
}

func TestFindTool(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "empty"), nil, 0o755),
		os.Mkdir(filepath.Join(dir, "directory"), 0o755),
		os.WriteFile(filepath.Join(dir, "real"), []byte("x"), 0o755),
		os.Symlink("real", filepath.Join(dir, "link")),
	); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"empty", "directory", "missing"} {
		_, err := findTool(name, "some-package")
		if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("%s: %v, want ErrUnavailable", name, err)
		}
		for _, w := range []string{name, "some-package", dir} {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q lacks %q", err, w)
			}
		}
	}
	if got, err := findTool("link", ""); err != nil || got != filepath.Join(dir, "real") {
		t.Errorf("link is found as %q, %v", got, err)
	}
}
