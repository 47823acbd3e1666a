// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

func newFormatter(t testing.TB, change func(*Config)) *Formatter {
	t.Helper()
	c := Config{Init: testenv.Binary(t), CacheDir: testenv.CacheDir(t)}
	if change != nil {
		change(&c)
	}
	f, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// image makes an empty file.
func image(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "image-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close(); os.Remove(f.Name()) })
	return f
}

func TestFormat(t *testing.T) {
	testenv.Root(t)
	dir := testenv.Dir(t)
	for _, fs := range diskfs.Names() {
		for _, bytes := range []int64{300 << 20, 1 << 30, 100 << 30} {
			t.Run(fmt.Sprintf("%s/%dMiB", fs, bytes>>20), func(t *testing.T) {
				f := image(t, dir)
				var stages []guest.Stage
				spec := diskfs.Spec{Filesystem: fs, Size: bytes, Label: "data"}
				note := func(p guest.Progress) { stages = append(stages, p.Stage) }
				report, err := newFormatter(t, nil).Format(t.Context(), f, spec, nil, note)
				if err != nil {
					t.Fatal(err)
				}
				if got := fmt.Sprint(stages); got != "[boot mkfs check done]" {
					t.Errorf("the stages are %s", got)
				}
				testenv.Fsck(t, fs, f.Name())
				if got := strings.TrimSpace(testenv.Run(t, "blkid", "-p", "-o", "value", "-s", "LABEL", f.Name())); got != "data" {
					t.Errorf("the label is %q, want data", got)
				}
				if got := strings.TrimSpace(testenv.Run(t, "blkid", "-p", "-o", "value", "-s", "UUID", f.Name())); got != report.UUID {
					t.Errorf("blkid says that the UUID is %s, the report says %s", got, report.UUID)
				}
				extents, err := fiemap.Count(f)
				if err != nil {
					t.Fatal(err)
				}
				fi, err := f.Stat()
				if err != nil {
					t.Fatal(err)
				}
				allocated := fi.Sys().(*syscall.Stat_t).Blocks * 512
				t.Logf("%s: boot %s, mkfs %s, check %s, in all %s; %d extents, %s allocated; %s, Linux %s, %s", spec,
					report.Boot, report.Make, report.Check, report.Elapsed, extents, size.Format(allocated), report.Mkfs, report.Kernel, report.Accelerator)
				if allocated > 80<<20 {
					t.Errorf("%s are allocated: a template must stay sparse", size.Format(allocated))
				}
			})
		}
	}
}

// TestUpgradeKeepsTemplates formats with two versions of the product, whose guest is the same. The
// templates of one must be those of the other.
func TestUpgradeKeepsTemplates(t *testing.T) {
	dir := testenv.Dir(t)
	spec := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	var keys []string
	for _, version := range []string{"v1.0.0", "v1.0.1"} {
		bin := filepath.Join(dir, version)
		build := exec.Command("go", "build", "-ldflags", "-s -w -X main.version="+version, "-o", bin, "../../cmd/csi-disktemplate")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if out := testenv.Run(t, bin, "--version"); !strings.Contains(out, version) {
			t.Fatalf("version %s calls itself %s", version, out)
		}
		f := newFormatter(t, func(c *Config) { c.Init = bin })
		before, err := f.Fingerprint(spec, nil)
		if err != nil {
			t.Fatal(err)
		}
		made, err := f.Format(t.Context(), image(t, dir), spec, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, before, made.Fingerprint)
	}
	if distinct := slices.Compact(keys); len(distinct) != 1 {
		t.Errorf("the fingerprints, before and after formatting, are %q", keys)
	}
}

// TestFormatUnprivileged runs the command line as an ordinary user.
func TestFormatUnprivileged(t *testing.T) {
	testenv.Root(t)
	dir := testenv.Dir(t)
	bin := filepath.Join(dir, "csi-disktemplate")
	testenv.Run(t, "cp", testenv.Binary(t), bin)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(bin, 0o755), os.Mkdir(filepath.Join(dir, "home"), 0o755), os.Chown(filepath.Join(dir, "home"), 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "home", "disk.img")
	cmd := exec.Command(bin, "format", "--fs", "ext4", "--size", "64Mi", "-o", out)
	cmd.Env = []string{"HOME=" + filepath.Join(dir, "home"), "PATH=/usr/bin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	testenv.Fsck(t, "ext4", out)
}

// TestTruncatedKernel has half a vmlinuz, as an interrupted installation leaves behind.
func TestTruncatedKernel(t *testing.T) {
	k, err := newFormatter(t, nil).findKernel(amd64)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(k.path)
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(testenv.Dir(t), "vmlinuz")
	if err := os.WriteFile(half, b[:len(b)/2], 0o644); err != nil {
		t.Fatal(err)
	}
	f := newFormatter(t, func(c *Config) { c.Kernel = half; c.CacheDir = testenv.Dir(t) })
	_, err = f.Format(t.Context(), image(t, testenv.Dir(t)), diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}, nil, nil)
	unavailable(t, err, "unpacking "+half, "reinstall it or give another --kernel")
}

// TestCachedKernelHeals damages the cached vmlinux. It must be unpacked again.
func TestCachedKernelHeals(t *testing.T) {
	dir := testenv.Dir(t)
	k, err := newFormatter(t, nil).readKernel(amd64)
	if err != nil {
		t.Fatal(err)
	}
	first, err := k.unpacked(dir)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(first.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{0, int64(len(want)) / 2} {
		if err := os.Truncate(first.path, size); err != nil {
			t.Fatal(err)
		}
		again, err := k.unpacked(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(again.path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("a vmlinux cut to %d bytes was not unpacked again: %v", size, err)
		}
	}
}

// TestKernelInMemory unpacks the kernel where it cannot be kept, and boots it as root does, in
// a cage. The command's TestFormatWithoutHome boots it without one.
func TestKernelInMemory(t *testing.T) {
	file := filepath.Join(testenv.Dir(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	full := testenv.Ext4.Mount(t, 64<<20)
	testenv.Fill(t, full)
	for name, dir := range map[string]string{"a file is in the way": filepath.Join(file, "cache"), "full": full} {
		t.Run(name, func(t *testing.T) {
			f := newFormatter(t, func(c *Config) { c.CacheDir = dir })
			k, err := f.readKernel(amd64)
			if err != nil {
				t.Fatal(err)
			}
			b, err := k.unpacked(dir)
			if err != nil || b.path != "" || !k.form.ready(b.memory) {
				t.Fatalf("unpacked is at %q, or no kernel: %v", b.path, err)
			}
			b.memory.Close()
			image := image(t, testenv.Dir(t))
			if _, err := f.Format(t.Context(), image, diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}, nil, nil); err != nil {
				t.Fatal(err)
			}
			testenv.Fsck(t, "ext4", image.Name())
		})
	}
}

// TestBootAsIs boots a bzImage whose kernel cannot be unpacked, as one that is compressed with
// lzo. QEMU unpacks it.
func TestBootAsIs(t *testing.T) {
	v, f := broken(t, func(r kit) {
		r.kernel.digest = strings.Repeat("0", 64) // nothing is kept of it
		r.kernel.form.unpack = func(io.Writer, io.Reader) error { return errBootAsIs }
	}, nil)
	if !strings.Contains(v.kernel.path, "vmlinuz") {
		t.Errorf("QEMU boots %q", v.kernel.path)
	}
	if err := runOne(t.Context(), v, f, nil).judge(); err != nil {
		t.Error(err)
	}
}

func TestUnavailable(t *testing.T) {
	f := image(t, testenv.Dir(t))
	spec := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	t.Run("qemu", func(t *testing.T) {
		_, err := newFormatter(t, func(c *Config) { c.QEMU = "/nonexistent/qemu" }).Format(t.Context(), f, spec, nil, nil)
		unavailable(t, err, "/nonexistent/qemu", "install the package qemu-system-x86")
	})
	t.Run("kernel", func(t *testing.T) {
		_, err := newFormatter(t, func(c *Config) { c.Kernel = "/nonexistent/vmlinuz" }).Format(t.Context(), f, spec, nil, nil)
		unavailable(t, err, "/nonexistent/vmlinuz", "--kernel")
	})
	t.Run("kernel is no kernel", func(t *testing.T) {
		_, err := newFormatter(t, func(c *Config) { c.Kernel = "/bin/ls" }).Format(t.Context(), f, spec, nil, nil)
		unavailable(t, err, "/bin/ls", "give a vmlinuz or vmlinux")
	})
	t.Run("modules", func(t *testing.T) {
		k, err := newFormatter(t, nil).findKernel(amd64)
		if err != nil {
			t.Fatal(err)
		}
		_, err = newFormatter(t, func(c *Config) { c.Kernel = k.path; c.Modules = "/nonexistent" }).Format(t.Context(), f, spec, nil, nil)
		unavailable(t, err, "/nonexistent", "install the modules of kernel")
	})
	t.Run("kvm", func(t *testing.T) {
		if kvm.Usable() == nil {
			t.Log("KVM works here: nothing to refuse")
			return
		}
		_, err := newFormatter(t, func(c *Config) { c.Accel = AccelKVM }).Format(t.Context(), f, spec, nil, nil)
		unavailable(t, err, "kvm was asked for", "--accel=tcg")
	})
	if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
		t.Errorf("the file has %d bytes, want 0: %v", fi.Size(), err)
	}
}

func unavailable(t *testing.T, err error, words ...string) {
	t.Helper()
	if !errors.Is(err, ErrUnavailable) {
		t.Fatalf("%v, want ErrUnavailable", err)
	}
	t.Logf("the operator reads: %v", err)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
}

// TestDiesWithParent kills a process in the middle of a format. Its QEMU must end with it, and
// its unnamed file must go.
func TestDiesWithParent(t *testing.T) {
	testenv.Root(t)
	dir := testenv.Dir(t)
	cmd := exec.Command(testenv.Binary(t), "format", "--fs", "ext4", "--size", "64Mi", "-o", filepath.Join(dir, "disk.img"))
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+filepath.Dir(testenv.CacheDir(t)))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var qemu int
	for deadline := time.Now().Add(30 * time.Second); qemu == 0 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		qemu = findChild(cmd.Process.Pid, "qemu-system")
	}
	if qemu == 0 {
		t.Fatal("QEMU never started")
	}
	cmd.Process.Kill()
	cmd.Wait()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", qemu)); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("QEMU %d outlived its parent", qemu)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("%v was left behind", entries)
	}
}

// realMode returns a firmware of a few real-mode instructions. It prints K on the serial port
// and resets the machine.
func realMode() []byte {
	rom := bytes.Repeat([]byte{0xf4}, 64<<10) // hlt
	code := []byte{
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, 'K', // mov al, 'K'
		0xee,       // out dx, al
		0xb0, 0xfe, // mov al, 0xfe
		0xe6, 0x64, // out 0x64, al: reset through the keyboard controller
		0xf4, // hlt
	}
	copy(rom[0xff00:], code)
	copy(rom[0xfff0:], []byte{0xea, 0x00, 0xff, 0x00, 0xf0}) // jmp f000:ff00
	return rom
}

// TestKVMInCage checks that a QEMU in its cage reaches KVM, whatever the mode of /dev/kvm is,
// with accelerator, seccomp filter and unprivileged user together. A KVM that emulates can
// still run a few real-mode instructions.
func TestKVMInCage(t *testing.T) {
	testenv.Root(t)
	if _, err := os.Stat(kvm.Device); err != nil {
		t.Logf("no %s on this machine: nothing to reach", kvm.Device)
		return
	}
	v, _ := broken(t, nil, func(v *vm) { v.accel = v.machine.accelerators[AccelKVM] })
	s := v.cageSpec()
	s.Files["/rom"] = io.NopCloser(bytes.NewReader(realMode()))
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, v.qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "isapc", "-accel", "kvm", "-m", "16", "-bios", "/rom",
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cage.Run(cmd, s)
	t.Logf("QEMU: %v, printed %q", err, out.String())
	if !strings.HasPrefix(out.String(), "K") {
		t.Error("the guest did not print K")
	}
}

func findProcess(word string) int {
	return findWhere(func(_ int, cmdline string) bool {
		return strings.Contains(cmdline, word) && strings.Contains(cmdline, "qemu-system")
	})
}

func findChild(parent int, word string) int {
	return findWhere(func(pid int, cmdline string) bool {
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		return len(fields) > 1 && fields[1] == strconv.Itoa(parent) && strings.Contains(cmdline, word)
	})
}

func findWhere(match func(pid int, cmdline string) bool) int {
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		pid, _ := strconv.Atoi(strings.Split(d, "/")[2])
		if err == nil && match(pid, string(b)) {
			return pid
		}
	}
	return 0
}

// newFloor returns a function that boots the VM's kernel with an init that powers off and does nothing
// else, and how long that takes. No template can be built faster that needs a boot.
func newFloor(b *testing.B) func() time.Duration {
	f := newFormatter(b, nil)
	r, err := f.gather("ext4")
	if err != nil {
		b.Fatal(err)
	}
	init := filepath.Join(testenv.Dir(b), "init")
	if err := os.WriteFile(init, powerOff(), 0o755); err != nil {
		b.Fatal(err)
	}
	r.files, r.init = nil, map[string]file{guest.InitPath: {mode: cpio.S_IFREG | 0o555, from: init, open: func() (*os.File, error) { return os.Open(init) }}}
	return func() time.Duration {
		v, err := f.plan(r, AccelTCG)
		if err != nil {
			b.Fatal(err)
		}
		defer v.close()
		o := v.run(b.Context(), nil)
		if o.exit != nil || o.events.shutdown != reasonGuestShutdown {
			b.Fatalf("QEMU: %v, shutdown %q", o.exit, o.events.shutdown)
		}
		return o.elapsed
	}
}

// powerOff is a static program of x86-64 that powers off: reboot(2).
func powerOff() []byte {
	code := []byte{
		0xb8, 169, 0, 0, 0, // mov eax, SYS_reboot
		0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
		0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
		0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, LINUX_REBOOT_CMD_POWER_OFF
		0x0f, 0x05, // syscall
	}
	const base = 0x400000
	header := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		Entry: base + 64 + 56,
	}
	size := uint64(64 + 56 + len(code))
	segment := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 4096}
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, header)
	binary.Write(&b, binary.LittleEndian, segment)
	b.Write(code)
	return b.Bytes()
}

// BenchmarkPack reads this machine's kernel, programs and modules, and packs what the VM gets.
// With -benchmem it shows how much memory that takes: little, since nothing is read as a whole.
func BenchmarkPack(b *testing.B) {
	f := newFormatter(b, nil)
	for _, fs := range diskfs.Names() {
		b.Run(fs, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r, err := f.gather(fs)
				if err != nil {
					b.Fatal(err)
				}
				v, err := f.plan(r, AccelTCG)
				if err != nil {
					b.Fatal(err)
				}
				v.close()
			}
		})
	}
}

// BenchmarkFormat formats a file for a template, with a VM that boots and with one that is restored, beside
// the floor, in turns. It shows what takes the time, in ms, and the ratios to the floor; all are medians.
func BenchmarkFormat(b *testing.B) {
	testenv.Root(b)
	floor := newFloor(b)
	for _, fs := range diskfs.Names() {
		b.Run(fs+"-1GiB", func(b *testing.B) {
			dir := testenv.Dir(b)
			restores := newFormatter(b, func(c *Config) { c.CacheDir, c.Save = dir, true })
			boots := newFormatter(b, func(c *Config) { c.CacheDir = dir })
			format := func(f *Formatter) (Report, time.Duration) {
				file := image(b, dir)
				defer file.Close()
				start := time.Now()
				r, err := f.Format(b.Context(), file, diskfs.Spec{Filesystem: fs, Size: 1 << 30}, nil, nil)
				if err != nil || r.Restored && f == boots {
					b.Fatalf("restored: %v: %v", r.Restored, err)
				}
				return r, time.Since(start)
			}
			format(restores) // unpacks the kernel, and saves the VM
			seen := map[string][]float64{}
			note := func(name string, d time.Duration) { seen[name] = append(seen[name], float64(d.Microseconds())/1000) }
			for b.Loop() {
				note("floor", floor())
				for name, f := range map[string]*Formatter{"boots": boots, "restored": restores} {
					r, all := format(f)
					note(name, all)
					for phase, d := range map[string]time.Duration{
						"1-prepare": r.Prepare, "2-boot": r.Boot, "3-disks": r.Disks, "4-mkfs": r.Make, "5-check": r.Check,
						"6-off": r.Elapsed - r.Boot - r.Disks - r.Make - r.Check, "7-host": r.Host,
					} {
						note(name+"-"+phase, d)
					}
				}
			}
			median := func(name string) float64 { return slices.Sorted(slices.Values(seen[name]))[len(seen[name])/2] }
			for name := range seen {
				b.ReportMetric(median(name), name)
			}
			b.ReportMetric(median("boots")/median("floor"), "boots/floor")
			b.ReportMetric(median("restored")/median("floor"), "restored/floor")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkFormatMany formats 100 files of 100 sizes, 32 at once.
func BenchmarkFormatMany(b *testing.B) {
	testenv.Root(b)
	dir := testenv.Dir(b)
	for _, fs := range diskfs.Names() {
		b.Run(fs, func(b *testing.B) {
			for b.Loop() {
				f := newFormatter(b, func(c *Config) { c.CacheDir, c.Save = dir, true })
				var g errgroup.Group
				g.SetLimit(32)
				for i := range int64(100) {
					file := image(b, dir)
					g.Go(func() error {
						defer file.Close()
						_, err := f.Format(b.Context(), file, diskfs.Spec{Filesystem: fs, Size: 1<<30 + i<<20}, nil, nil)
						return err
					})
				}
				if err := g.Wait(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
