// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

// makeImages formats the images that the other ways clone and copy, by the command format, which needs no pool.
func (b *bench) makeImages(ctx context.Context) error {
	if err := os.Setenv("XDG_CACHE_HOME", filepath.Join(b.dir, "cache")); err != nil { // where format keeps the unpacked kernel
		return err
	}
	sizes := []int64{volumeSize}
	if b.o.cases.MatchString("dirty") {
		sizes = append(sizes, dirtySize)
	}
	for _, size := range sizes {
		for _, fs := range filesystems {
			if _, err := b.format(ctx, kind{fs, size}); err != nil {
				return err
			}
		}
	}
	return nil
}

// builds measures the command format, whose VM boots each time: later builds of a plugin restore theirs, see [sizes]. In turns with it the same kernel boots with an init that powers the VM off: no VM
// can go below that.
func builds(ctx context.Context, b *bench, _ *bed) error {
	for range b.rounds(5, 1, 40*time.Second) {
		for _, fs := range b.shuffled(filesystems) {
			took, err := b.format(ctx, kind{fs, volumeSize})
			if err != nil {
				return err
			}
			k := key{Case: "template", FS: fs, What: "template build", Way: plugin}
			b.add(k, milliseconds(took))
			k.Way = floor
			if err := b.vmFloor(ctx, k); err != nil {
				return err
			}
		}
	}
	return b.coldTemplates(ctx)
}

// coldTemplates formats after the page cache was dropped, as it is when a machine has just booted.
func (b *bench) coldTemplates(ctx context.Context) error {
	for _, fs := range filesystems {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
			return err
		}
		took, err := b.format(ctx, kind{fs, volumeSize})
		if err != nil {
			return err
		}
		b.add(key{Case: "template", FS: fs, What: "template build, cold", Way: plugin}, milliseconds(took))
	}
	return nil
}

var madeUnder = regexp.MustCompile(`made by .* on Linux (\S+) under (\w+)`)

// format makes an image by the command, and keeps the last one of each kind, and the VM's kernel and accelerator.
func (b *bench) format(ctx context.Context, of kind) (took time.Duration, err error) {
	image := filepath.Join(b.dir, fmt.Sprintf("%s-%d.img", of.fs, of.size>>20))
	os.Remove(image)
	began := time.Now()
	cmd := exec.CommandContext(ctx, b.o.binary, "format", "--fs", of.fs, "--size", fmt.Sprint(of.size), "--output", image)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	out, err := cmd.CombinedOutput()
	took = time.Since(began)
	if err != nil {
		return 0, fmt.Errorf("format: %w\n%s", err, out)
	}
	m := madeUnder.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("format does not say on which kernel, and under which accelerator: %s", out)
	}
	b.images[of], b.kernel, b.accel = image, string(m[1]), string(m[2])
	return took, nil
}

// vmFloor boots the VM's kernel, and adds how long that took to a series.
func (b *bench) vmFloor(ctx context.Context, k key) error {
	kernel, err := b.unpackedKernel()
	if err != nil {
		return err
	}
	initrd := filepath.Join(b.dir, "poweroff.cpio")
	if err := writeInitramfs(initrd, cpio.StaticFile("init", string(powerOff()), 0o755)); err != nil {
		return err
	}
	_, took, err := runVM(ctx, floorVM(kernel, initrd, b.accel))
	if err == nil {
		b.add(k, milliseconds(took))
	}
	return err
}

// unpackedKernel is the one that format has unpacked.
func (b *bench) unpackedKernel() (string, error) {
	kernels, err := filepath.Glob(filepath.Join(b.dir, "cache", "csi-disktemplate", "vmlinux-*"))
	if err != nil || len(kernels) != 1 {
		return "", errors.Join(err, fmt.Errorf("format has unpacked %d kernels, not one", len(kernels)))
	}
	return kernels[0], nil
}

// runVM runs a VM until it powers itself off, and returns what its console said.
func runVM(ctx context.Context, args []string) (console []byte, took time.Duration, err error) {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return nil, 0, fmt.Errorf("a VM to compare with: %w\n%s", err, out.Bytes())
	}
	took = time.Since(began)
	if bytes.Contains(out.Bytes(), []byte("panic")) {
		return nil, 0, fmt.Errorf("a VM to compare with: its kernel says\n%s", out.Bytes())
	}
	return out.Bytes(), took, nil
}

// floorVM is QEMU's command line: the machine of the formatting VM, without disks. Init gets words as its environment.
func floorVM(kernel, initrd, accel string, words ...string) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "microvm", "-m", "256", "-smp", "1",
		"-kernel", kernel, "-initrd", initrd, "-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
	}
	line := strings.Join(append([]string{"console=ttyS0 quiet panic=-1 cryptomgr.notests"}, words...), " ")
	if accel == "kvm" {
		return append(args, "-accel", "kvm", "-cpu", "host", "-append", line)
	}
	return append(args, "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max", "-append", line+fmt.Sprintf(" tsc_early_khz=%d", cpuKHz()))
}

// writeInitramfs writes an archive with a console and other files.
func writeInitramfs(path string, more ...cpio.Record) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	console := []cpio.Record{cpio.Directory("dev", 0o755), cpio.CharDev("dev/console", 0o600, 5, 1)}
	err = cpio.WriteRecords(w, append(console, more...))
	if err == nil {
		err = cpio.WriteTrailer(w)
	}
	return errors.Join(err, f.Close())
}

// powerOff is a program for x86-64 Linux, the smallest that there is for this: an ELF header, one segment, and
// reboot(LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_POWER_OFF).
func powerOff() []byte {
	code := []byte{
		0xb8, 169, 0, 0, 0, // mov eax, SYS_reboot
		0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, 0xfee1dead
		0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, 672274793
		0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, 0x4321fedc
		0x0f, 0x05, // syscall
		0xeb, 0xfe, // loop for ever, should it return
	}
	const at, headers = 0x400000, 64 + 56
	var b bytes.Buffer
	put := func(fields ...any) {
		for _, f := range fields {
			binary.Write(&b, binary.LittleEndian, f)
		}
	}
	b.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	put(uint16(2), uint16(62), uint32(1), uint64(at+headers), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0))
	size := uint64(headers + len(code))
	put(uint32(1), uint32(5), uint64(0), uint64(at), uint64(at), size, size, uint64(4096))
	b.Write(code)
	return b.Bytes()
}
