// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// printed is what format prints with --json.
type printed struct {
	Filesystem, Template, CopiedBecause, Content string
	SizeBytes, SharesBytes                       int64
	TemplateHit                                  bool
	Disks                                        []struct {
		Path, UUID string
		TakesBytes int64
	}
}

// formatJSON runs format, which must succeed. It returns what was printed on standard error too.
func formatJSON(t *testing.T, args ...string) (p printed, said string) {
	t.Helper()
	var out, log bytes.Buffer
	cmd := exec.CommandContext(t.Context(), testenv.Binary(t), append([]string{"format", "--json"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &log
	err := cmd.Run()
	t.Logf("%q\n%s\n%s", args, &log, &out)
	if err == nil {
		err = json.Unmarshal(out.Bytes(), &p)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p, log.String()
}

// mountAll mounts all images at the same time, writes to each, and checks the contents and the filesystems.
func mountAll(t *testing.T, filesystem string, p printed) {
	t.Helper()
	uuids := map[string]bool{}
	var mounted []string
	for i, d := range p.Disks {
		uuids[d.UUID] = true
		at := testenv.Dir(t)
		testenv.Run(t, "mount", "-o", "loop", d.Path, at)
		t.Cleanup(func() {
			if testenv.IsMounted(t, at) {
				testenv.Unmount(t, at)
			}
		})
		mounted = append(mounted, at)
		if err := os.WriteFile(filepath.Join(at, "own"), fmt.Append(nil, i), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(testenv.Run(t, "findmnt", "-n", "-o", "UUID", "--mountpoint", at)); got != d.UUID {
			t.Errorf("%s is mounted with the UUID %s, and was made with %s", d.Path, got, d.UUID)
		}
	}
	if len(uuids) != len(p.Disks) {
		t.Errorf("%d images have %d UUIDs", len(p.Disks), len(uuids))
	}
	for i, at := range mounted {
		if b, err := os.ReadFile(filepath.Join(at, "own")); err != nil || string(b) != fmt.Sprint(i) {
			t.Errorf("image %d has %q: %v", i, b, err)
		}
		testenv.Umount(t, at)
		testenv.Fsck(t, filesystem, p.Disks[i].Path)
	}
}

// TestFormatMany makes twenty images of each filesystem on each, from a cache: clones where that is
// possible. The second run builds nothing.
func TestFormatMany(t *testing.T) {
	const many = 20
	size := map[string]string{"ext4": "64Mi", "xfs": "300Mi", "btrfs": "128Mi"}
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Btrfs, testenv.Ext4} {
		for _, filesystem := range slices.Compact([]string{"ext4", kind.Name}) {
			t.Run(filesystem+" on "+kind.Name, func(t *testing.T) {
				dir := kind.Mount(t, 4<<30)
				args := []string{"--fs", filesystem, "--size", size[filesystem], "--accel", "tcg",
					"--cache", filepath.Join(dir, "cache"), "-n", fmt.Sprint(many), "-o", filepath.Join(dir, "disk-{}.img")}
				p, said := formatJSON(t, args...)
				if len(p.Disks) != many || p.TemplateHit || p.Filesystem != filesystem || !strings.Contains(said, "mkfs ") {
					t.Fatalf("%+v", p)
				}
				for i, d := range p.Disks {
					if want := filepath.Join(dir, fmt.Sprintf("disk-%d.img", i+1)); d.Path != want {
						t.Errorf("image %d is %s, want %s", i, d.Path, want)
					}
					if fi, err := os.Stat(d.Path); err != nil || fi.Size() != p.SizeBytes {
						t.Errorf("%v, %v, want %d bytes", fi, err, p.SizeBytes)
					}
				}
				clones := kind.Name != "ext4"
				because := map[bool]string{false: "ext4 cannot share extents"}[clones]
				if p.CopiedBecause != because || (p.SharesBytes > 0) != clones {
					t.Errorf("shares %d bytes, copied because %q", p.SharesBytes, p.CopiedBecause)
				}
				if clones && p.Disks[0].TakesBytes >= p.SharesBytes {
					t.Errorf("a clone takes %d bytes of its own, and shares %d", p.Disks[0].TakesBytes, p.SharesBytes)
				}
				mountAll(t, filesystem, p)
				before := readAll(t, dir)
				fails(t, append([]string{"format"}, args...), "20 of the 20 files exist already", "disk-1.img", "--force")
				if !slices.Equal(before, readAll(t, dir)) {
					t.Error("a run that was refused has changed something")
				}
				again, said := formatJSON(t, append(args, "--force")...)
				if !again.TemplateHit || again.Template != p.Template || strings.Contains(said, "mkfs ") {
					t.Errorf("the second run was no hit: %+v\n%s", again, said)
				}
				if again.Disks[0].UUID == p.Disks[0].UUID {
					t.Error("--force has replaced nothing")
				}
			})
		}
	}
}

// readAll lists the images of a directory with their UUIDs.
func readAll(t *testing.T, dir string) (all []string) {
	t.Helper()
	images, err := filepath.Glob(filepath.Join(dir, "*.img"))
	if err != nil || len(images) == 0 {
		t.Fatalf("no images: %v", err)
	}
	for _, image := range images {
		all = append(all, testenv.Run(t, "blkid", "-p", image))
	}
	return all
}

// TestFormatWithoutCache makes images of one that has no name: one VM, whether they are clones or copies.
func TestFormatWithoutCache(t *testing.T) {
	for _, kind := range []testenv.Kind{testenv.XFS, testenv.Ext4} {
		dir := kind.Pool(t)
		p, said := formatJSON(t, "--size", "64Mi", "--accel", "tcg", "-n", "3", "-o", filepath.Join(dir, "disk-{}.img"))
		if strings.Count(said, "mkfs ") != 1 || len(p.Disks) != 3 || p.Template != "" {
			t.Errorf("on %s: %+v\n%s", kind.Name, p, said)
		}
		mountAll(t, "ext4", p)
		if got := imagesIn(t, dir); !slices.Equal(got, []string{"disk-1.img", "disk-2.img", "disk-3.img"}) {
			t.Errorf("made %q", got)
		}
	}
}

// TestFormatCopiesAcross makes images on another filesystem than the cache's.
func TestFormatCopiesAcross(t *testing.T) {
	cache, dir := filepath.Join(testenv.XFS.Pool(t), "cache"), testenv.XFS.Pool(t)
	args := []string{"--size", "64Mi", "--accel", "tcg", "--cache", cache, "-n", "2", "-o"}
	p, _ := formatJSON(t, append(args, filepath.Join(dir, "disk-{}.img"))...)
	if p.CopiedBecause != "the template is on another filesystem" {
		t.Errorf("%+v", p)
	}
	mountAll(t, "ext4", p)
	code, out := testenv.Product(t, append([]string{"format"}, append(args, filepath.Join(dir, "more-{}.img"))...)...)
	for _, says := range []string{
		"2 images, " + filepath.Join(dir, "more-1.img") + " to ", "template ext4-64m-", "was there, in " + cache,
		"copies, since the template is on another filesystem: each takes ",
	} {
		if code != 0 || !strings.Contains(out, says) {
			t.Errorf("exit code %d, does not say %q", code, says)
		}
	}
}

// TestFormatDamagedCache damages the template in a cache. It is built again.
func TestFormatDamagedCache(t *testing.T) {
	dir := testenv.XFS.Pool(t)
	cache := filepath.Join(dir, "cache")
	run := func(name string) printed {
		t.Helper()
		p, said := formatJSON(t, "--size", "64Mi", "--accel", "tcg", "--cache", cache, "-o", filepath.Join(dir, name))
		testenv.Fsck(t, "ext4", p.Disks[0].Path)
		if damaged := strings.Contains(said, "template is corrupt: "); damaged != (name == "b.img") {
			t.Errorf("says that the template is damaged: %v", damaged)
		}
		return p
	}
	first := run("a.img")
	f, err := os.OpenFile(filepath.Join(cache, "templates", first.Template), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("damaged"), 8<<10)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if again := run("b.img"); again.TemplateHit || again.Template != first.Template {
		t.Errorf("%+v after %+v", again, first)
	}
	if last := run("c.img"); !last.TemplateHit {
		t.Errorf("%+v", last)
	}
}

// TestFormatNoSpace makes more images than there is room for. Those that were made are whole.
func TestFormatNoSpace(t *testing.T) {
	fs := testenv.Ext4.Mount(t, 64<<20)
	cache := filepath.Join(testenv.Dir(t), "cache")
	args := []string{"format", "--fs", "btrfs", "--size", "128Mi", "--accel", "tcg", "--cache", cache, "-n"}
	fails(t, append(args, "200", "-o", filepath.Join(fs, "disk-{}.img")),
		" of 200 images were made, and no part of another one: ", "no space left on device",
		"make room on its filesystem", "images, "+filepath.Join(fs, "disk-1.img")+" to ")
	mustBeWhole(t, fs, "btrfs", 200)

	full := testenv.Ext4.Mount(t, 64<<20)
	testenv.Fill(t, full)
	fails(t, []string{"format", "--cache", filepath.Join(full, "cache"), "-o", filepath.Join(fs, "other.img")},
		"--cache", "no space left on device", "or delete "+full)
	fails(t, append(args, "2", "-o", filepath.Join(full, "{}.img")), "0 of 2 images were made", "make room")
}

// imagesIn lists a directory, without what an ext4 has from the start.
func imagesIn(t *testing.T, dir string) []string {
	t.Helper()
	return slices.DeleteFunc(names(t, dir), func(name string) bool { return name == "lost+found" })
}

// mustBeWhole checks the images of a directory, of which there must be some and not all.
func mustBeWhole(t *testing.T, dir, filesystem string, want int) {
	t.Helper()
	images := imagesIn(t, dir)
	if len(images) == 0 || len(images) >= want {
		t.Errorf("there are %d images", len(images))
	}
	for _, image := range images {
		if filepath.Ext(image) != ".img" || strings.HasPrefix(image, ".") {
			t.Errorf("%s is none that was asked for", image)
		}
	}
	for _, image := range images[:min(5, len(images))] {
		testenv.Fsck(t, filesystem, filepath.Join(dir, image))
	}
}

// TestFormatInterrupted ends a run in between, by the signals that people and systems send.
func TestFormatInterrupted(t *testing.T) {
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM, os.Kill} {
		t.Run(signal.String(), func(t *testing.T) {
			const many = 5000
			dir := testenv.XFS.Mount(t, 1<<30)
			args := []string{"format", "--size", "64Mi", "--accel", "tcg", "--cache", filepath.Join(dir, "cache")}
			if code, _ := testenv.Product(t, append(args, "-o", filepath.Join(dir, "first.img"))...); code != 0 {
				t.Fatalf("exit code %d", code)
			}
			out := filepath.Join(dir, "many")
			if err := os.Mkdir(out, 0o700); err != nil {
				t.Fatal(err)
			}
			var said bytes.Buffer
			args = append(args, "-n", fmt.Sprint(many), "-o", filepath.Join(out, "{}.img"))
			cmd := exec.CommandContext(t.Context(), testenv.Binary(t), args...)
			cmd.Stderr = &said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			testenv.Eventually(t, "some images", func() bool { return len(names(t, out)) > 20 })
			began := time.Now()
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			cmd.Wait() // its error says no more than ProcessState
			t.Logf("%s after %s: %s", cmd.ProcessState, time.Since(began), &said)
			mustBeWhole(t, out, "ext4", many)
			if signal == os.Kill {
				return
			}
			for _, says := range []string{
				fmt.Sprintf("%d of %d images were made, and no part of another one: ", len(names(t, out)), many),
				fmt.Sprintf("%d images, %s to ", len(names(t, out)), filepath.Join(out, "1.img")),
			} {
				if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said.String(), says) {
					t.Errorf("%s, does not say %q", cmd.ProcessState, says)
				}
			}
		})
	}
}

// TestFormatContent makes images with a content that a list names: files, and a whole disk.
func TestFormatContent(t *testing.T) {
	dir, files := testenv.XFS.Pool(t), testenv.Dir(t)
	list := filepath.Join(files, "contents.yaml")
	for name, text := range map[string][]byte{
		list: []byte("contents:\n- {name: files, tar: files.tar, namespaces: [shop], size: 96Mi}\n" +
			"- {name: vm, disk: vm.raw, namespaces: [shop]}\n"),
		filepath.Join(files, "files.tar"): archiveOf(t, file{"greeting", "hello", 0}),
		filepath.Join(files, "vm.raw"):    bytes.Repeat([]byte("disk"), 5<<18),
	} {
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cache := filepath.Join(dir, "cache")
	args := []string{"--contents", list, "--content-dir", files, "--accel", "tcg", "--cache", cache, "-n", "2"}
	p, said := formatJSON(t, append(args, "--content", "files", "-o", filepath.Join(dir, "files-{}.img"))...)
	told := strings.Contains(said, "read ") && strings.Contains(said, "unpack ")
	if p.SizeBytes != 96<<20 || p.Content != "files" || !told {
		t.Errorf("%+v\n%s", p, said)
	}
	mountAll(t, "ext4", p)
	at := testenv.Dir(t)
	testenv.Run(t, "mount", "-o", "loop", p.Disks[1].Path, at)
	t.Cleanup(func() { testenv.Unmount(t, at) })
	if b, err := os.ReadFile(filepath.Join(at, "greeting")); err != nil || string(b) != "hello" {
		t.Errorf("the content is %q: %v", b, err)
	}

	p, _ = formatJSON(t, append(args, "--content", "vm", "--size", "9Mi", "-o", filepath.Join(dir, "vm-{}.img"))...)
	b, err := os.ReadFile(p.Disks[1].Path)
	if want := append(bytes.Repeat([]byte("disk"), 5<<18), make([]byte, 4<<20)...); err != nil || !bytes.Equal(b, want) {
		t.Errorf("the disk has %d bytes, and not those of its content and zeros: %v", len(b), err)
	}
	p, _ = formatJSON(t, append(args, "--content", "vm", "-o", filepath.Join(dir, "same-{}.img"))...)
	if p.SizeBytes != 5<<20 || p.Disks[0].UUID != "" {
		t.Errorf("%+v", p)
	}
	for _, c := range []struct{ flags, says []string }{
		{[]string{"--content", "vm", "--size", "2Mi"}, []string{`--size "2Mi"`, "is a disk of 5Mi"}},
		{[]string{"--content", "other"}, []string{`"other" is not listed`}},
		{[]string{"--content", "files", "--cache", ""}, []string{`--content "files": needs --cache`}},
	} {
		none := []string{"-o", filepath.Join(dir, "none-{}.img")}
		fails(t, slices.Concat([]string{"format"}, args, none, c.flags), c.says...)
	}
}

// TestFormatDisksOfUsers: anybody can make images of a raw disk, and only root those of a qcow2.
func TestFormatDisksOfUsers(t *testing.T) {
	const nobody = 65534
	dir := testenv.Dir(t)
	home := filepath.Join(dir, "home")
	binary := filepath.Join(dir, "csi-disktemplate")
	testenv.Run(t, "cp", testenv.Binary(t), binary)
	list := "contents:\n- {name: raw, disk: vm.raw, namespaces: [x]}\n- {name: qcow2, disk: vm.qcow2, namespaces: [x]}\n"
	if err := errors.Join(
		os.Mkdir(home, 0o700), os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(home, "list"), []byte(list), 0o644),
		os.WriteFile(filepath.Join(home, "vm.raw"), make([]byte, 5<<20), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "qemu-img", "create", "-f", "qcow2", filepath.Join(home, "vm.qcow2"), "5M")
	testenv.Run(t, "chown", "-R", fmt.Sprint(nobody), home)
	for content, want := range map[string]struct {
		code int
		says string
	}{"raw": {0, "qcow2-or-raw.img: raw 5Mi content=raw"}, "qcow2": {1, "run this as root, or give it as a raw disk: "}} {
		cmd := exec.CommandContext(t.Context(), binary, "format", "--contents", "list", "--content-dir", ".",
			"--content", content, "--cache", "cache", "-o", "qcow2-or-raw.img", "--force")
		cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
		cmd.Dir = home
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		code, out := testenv.Finish(t, cmd)
		if code != want.code || !strings.Contains(out, want.says) || strings.Contains(out, "accelerator") {
			t.Errorf("%s: exit code %d, want %q", content, code, want.says)
		}
	}
}

// TestDisksDocumented types the commands of docs/disks.md, in an empty directory.
func TestDisksDocumented(t *testing.T) {
	blocks := blocksOf(t, "disks.md")
	if len(blocks) < 6 {
		t.Errorf("only %d blocks of commands were found", len(blocks))
	}
	dir := filepath.Join(testenv.XFS.Mount(t, 4<<30), "empty")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", "set -ex\n"+strings.Join(blocks, ""))
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(testenv.Binary(t))+":"+os.Getenv("PATH"))
	code, out := testenv.Finish(t, cmd)
	if code != 0 || strings.Count(out, "mkfs ") != 3 {
		t.Errorf("exit code %d; want three VMs", code)
	}
	for _, says := range []string{"clones: each takes ", "was there, in cache", `"uuid"`} {
		if !strings.Contains(out, says) {
			t.Errorf("does not say %s", says)
		}
	}
	for pattern, want := range map[string]int{"disk.img": 1, "disk-*.img": 200, "more-*.img": 3, "greeting-*.img": 3} {
		if found, err := filepath.Glob(filepath.Join(dir, pattern)); err != nil || len(found) != want {
			t.Errorf("there are %d of %s, want %d: %v", len(found), pattern, want, err)
		}
	}
}

// TestFormatManyNeedsNoRoot makes images from a cache as a user without privileges.
func TestFormatManyNeedsNoRoot(t *testing.T) {
	const nobody = 65534
	dir := testenv.XFS.Pool(t)
	home := filepath.Join(dir, "home")
	binary := filepath.Join(dir, "csi-disktemplate")
	testenv.Run(t, "cp", testenv.Binary(t), binary)
	if err := errors.Join(
		os.Mkdir(home, 0o700), os.Chown(home, nobody, nobody), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	run := func(cache, name string) (int, string) {
		t.Helper()
		// This one has so many inodes that its verification is noted: that takes an attribute that users may have.
		cmd := exec.CommandContext(t.Context(), binary, "format", "--size", "4Gi", "--option", "bytes-per-inode=4096",
			"--accel", "tcg", "-n", "2", "--cache", cache, "-o", name)
		cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
		cmd.Dir = home
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		return testenv.Finish(t, cmd)
	}
	for _, says := range []string{"was built", "was there"} {
		code, out := run("cache", "disk-"+strings.ReplaceAll(says, " ", "")+"-{}.img")
		noted := !strings.Contains(out, "not noted")
		if code != 0 || !noted || !strings.Contains(out, says) || !strings.Contains(out, "clones: each takes ") {
			t.Errorf("exit code %d, want %q", code, says)
		}
	}
	code, out := run(filepath.Join(dir, "of-root"), "no-{}.img")
	if code != 1 || !strings.Contains(out, `--cache "`+dir) || !strings.Contains(out, "permission denied") {
		t.Errorf("a cache where nobody may write: exit code %d", code)
	}
}
