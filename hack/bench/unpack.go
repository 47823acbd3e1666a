// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// The archives that are unpacked, the second one in a quick run: many small files, and some large ones.
var (
	unpackContent      = mixture{256 << 20, 4000}
	quickUnpackContent = mixture{64 << 20, 1000}
)

// unpacked is how long an archive takes: mount, the files, sync, unmount.
const unpacked = "unpacked"

// unpackGoals are those of each archive.
func unpackGoals() (goals []goal) {
	for _, m := range []mixture{unpackContent, quickUnpackContent} {
		what := m.with(unpacked)
		goals = append(goals, goal{"unpacking " + m.name() + " / tar onto a loop mount", term{what: what, way: plugin},
			term{what: what, way: tarInLoop}, atMost(1.2), ""})
	}
	return goals
}

// outerSize is the filesystem in which the VM has the file that it mounts through a loop device.
const outerSize = "4G"

// unpacking measures how the plugin's VM unpacks an archive, beside a usual tar in the same VM: on a file of a
// filesystem, through a loop device, and straight on a disk, as the plugin does it.
func unpacking(ctx context.Context, b *bench, d *bed) (err error) {
	m := unpackContent
	if b.o.quick {
		m = quickUnpackContent
	}
	w, err := b.newWithContents(ctx, d, "tar", func(path string) error { return m.write(path, 2) })
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	archive, initrd := w.file(contentName), w.file("tar.cpio")
	if err := b.writeTarInitramfs(initrd); err != nil {
		return err
	}
	k := key{Case: "contents-unpack", Pool: d.kind.name, What: m.with(unpacked)}
	ways := map[string]func(fs string) (time.Duration, error){
		plugin:    func(fs string) (time.Duration, error) { return w.unpack(ctx, fs) },
		tarInLoop: func(fs string) (time.Duration, error) { return b.tarInLoop(ctx, d, initrd, archive, fs) },
		tarOnDisk: func(fs string) (time.Duration, error) { return b.tarOnDisk(ctx, d, initrd, archive, fs) },
	}
	for range b.rounds(3, 1, 60*time.Second) {
		for _, k.FS = range b.shuffled(filesystems) {
			for _, k.Way = range b.shuffled([]string{plugin, tarInLoop, tarOnDisk}) {
				took, err := ways[k.Way](k.FS)
				if err != nil {
					return fmt.Errorf("%s of %s: %w", k.Way, k.FS, err)
				}
				b.add(k, took.Seconds())
			}
		}
	}
	return nil
}

var saysUnpacked = regexp.MustCompile(`"Unpacked a content".* unpack="([^"]+)"`)

// unpack has the plugin build a template of a size that it has not seen, and finds in its log how long it unpacked.
func (w withContents) unpack(ctx context.Context, fs string) (time.Duration, error) {
	by := overContent{overCSI{w.client}}
	v := w.volume(fs, volumeSize+w.serial.Load()<<20)
	if _, err := w.first(ctx, by, v); err != nil {
		return 0, err
	}
	if err := errors.Join(by.unpublish(ctx, v), by.tidy(v)); err != nil {
		return 0, err
	}
	log, err := os.ReadFile(w.Log)
	if err != nil {
		return 0, err
	}
	found := saysUnpacked.FindAllSubmatch(log, -1)
	if len(found) == 0 {
		return 0, fmt.Errorf("the plugin does not say how long it unpacked:\n%s", w.Tail())
	}
	return time.ParseDuration(string(found[len(found)-1][1]))
}

// tarInit is the script that the VM of a usual tar starts with.
//
//go:embed tar.init.sh
var tarInit string

// modulesAt is where the VM has kernel modules, in the order in which it loads them.
const modulesAt = "modules/"

// writeTarInitramfs writes an archive with busybox, the script, and the modules of disks, loop devices and filesystems.
func (b *bench) writeTarInitramfs(path string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w: %w", errMissing, err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	records := []cpio.Record{
		cpio.Directory("bin", 0o755), cpio.Directory(strings.TrimSuffix(modulesAt, "/"), 0o755),
		cpio.StaticFile("bin/busybox", string(program), 0o755), cpio.StaticFile("init", tarInit, 0o755),
	}
	modules, err := b.modules()
	if err != nil {
		return err
	}
	for i, name := range modules {
		module, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		at := fmt.Sprintf("%s%02d-%s", modulesAt, i, filepath.Base(name))
		records = append(records, cpio.StaticFile(at, string(module), 0o644))
	}
	return writeInitramfs(path, records...)
}

// modules are the files of the kernel's modules that the VM needs, in the order in which they are loaded:
// modules.dep(5). What is not there is part of the kernel.
func (b *bench) modules() (files []string, err error) {
	names := []string{"virtio_blk", "loop", "virtio_mmio"}
	for _, fs := range filesystems {
		format, err := diskfs.Lookup(fs)
		if err != nil {
			return nil, err
		}
		names = append(format.Modules, names...)
	}
	dir := filepath.Join("/lib/modules", b.kernel)
	list, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		of := regexp.MustCompile(`(?m)^(\S+/` + name + `\.ko\S*):(.*)$`).FindSubmatch(list)
		if of == nil {
			continue
		}
		needed := strings.Fields(string(of[2]))
		slices.Reverse(needed)
		for _, file := range append(needed, string(of[1])) {
			if file = filepath.Join(dir, file); !slices.Contains(files, file) {
				files = append(files, file)
			}
		}
	}
	return files, nil
}

// tarOnDisk unpacks an archive on a disk that has a new filesystem.
func (b *bench) tarOnDisk(ctx context.Context, d *bed, initrd, archive, fs string) (time.Duration, error) {
	image := filepath.Join(d.beside, "tar.img")
	defer os.Remove(image)
	if _, err := run(ctx, "cp", "--sparse=always", b.images[kind{fs, volumeSize}], image); err != nil {
		return 0, err
	}
	return b.tarVM(ctx, initrd, archive, image, "FS="+fs)
}

// tarInLoop unpacks an archive on a file with a new filesystem, which is on a disk with an ext4.
func (b *bench) tarInLoop(ctx context.Context, d *bed, initrd, archive, fs string) (time.Duration, error) {
	image, within := filepath.Join(d.beside, "tar.img"), filepath.Join(d.beside, "tar")
	defer func() { os.Remove(image); os.RemoveAll(within) }()
	for _, line := range [][]string{
		{"mkdir", within},
		{"cp", "--sparse=always", b.images[kind{fs, volumeSize}], filepath.Join(within, "volume.img")},
		{"mkfs.ext4", "-q", "-d", within, image, outerSize},
	} {
		if _, err := run(ctx, line...); err != nil {
			return 0, err
		}
	}
	return b.tarVM(ctx, initrd, archive, image, "FS="+fs, "OUTER=ext4")
}

var saysTook = regexp.MustCompile(`(?m)^unpacked from ([0-9.]+) to ([0-9.]+)\r?$`)

// tarVM runs the VM. Its disks are attached as those of the formatting VM are.
func (b *bench) tarVM(ctx context.Context, initrd, archive, image string, words ...string) (time.Duration, error) {
	kernel, err := b.unpackedKernel()
	if err != nil {
		return 0, err
	}
	args := append(floorVM(kernel, initrd, b.accel, words...),
		"-blockdev", "driver=file,node-name=f0,filename="+archive+",read-only=on",
		"-blockdev", "driver=raw,node-name=d0,file=f0,read-only=on",
		"-device", "virtio-blk-device,drive=d0,serial=archive",
		"-blockdev", "driver=file,node-name=f1,filename="+image+",cache.no-flush=on,discard=unmap",
		"-blockdev", "driver=raw,node-name=d1,file=f1,cache.no-flush=on,discard=unmap,detect-zeroes=unmap",
		"-device", "virtio-blk-device,drive=d1,serial=target,write-zeroes=off")
	out, _, err := runVM(ctx, args)
	if err != nil {
		return 0, err
	}
	took := saysTook.FindSubmatch(out)
	if took == nil {
		return 0, fmt.Errorf("the VM with a usual tar does not say how long it took:\n%s", out)
	}
	from, errFrom := strconv.ParseFloat(string(took[1]), 64)
	to, errTo := strconv.ParseFloat(string(took[2]), 64)
	return time.Duration((to - from) * float64(time.Second)), errors.Join(errFrom, errTo)
}
