// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/u-root/u-root/pkg/boot/bzimage"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
)

// machine is everything about the VM that differs by architecture and accelerator. The
// rest of the package uses these values and never asks which architecture or accelerator
// it has: another one is another value in machines.
type machine struct {
	qemu          string     // QEMU's program
	qemuPackage   string     // Debian package that has it
	kernelPackage string     // Debian package that has a kernel
	kernel        kernelForm // form of the kernels that distributions install
	modules       []string   // kernel modules that drive the disks, without their dependencies
	transports    []string   // kernel modules that show the disks to them, whose dependencies are those of the drivers
	model         string     // -M
	disk          string     // -device of a disk
	console       string     // the kernel's name of the serial port
	accelerators  map[Accel]accelerator
}

// accelerator is the part of a machine that differs by how the guest's instructions are
// run. Nothing in it may decide the bytes of a template: the fingerprint leaves it out.
type accelerator struct {
	name    Accel
	accel   string          // -accel
	cpu     string          // -cpu
	devices []string        // device nodes that QEMU opens
	cmdline func() []string // more words of the kernel's command line
	// saves tells whether a VM that has booted is saved, and restored for later batches. That is
	// worth it where a boot takes long. Under KVM it was never tried.
	saves bool
}

// kernelForm is the form of an installed kernel, and the way to the one that QEMU boots.
type kernelForm struct {
	ready   func(image io.ReaderAt) bool                  // reports whether QEMU boots the image as it is
	unpack  func(w io.Writer, image io.Reader) error      // writes the kernel inside any other image, or returns errBootAsIs
	version func(image *io.SectionReader) (string, error) // returns what uname -r will print
}

// machines has the known machines by architecture, as Go names it.
var machines = map[string]machine{"amd64": amd64}

var amd64 = machine{
	qemu:          "qemu-system-x86_64",
	qemuPackage:   "qemu-system-x86",
	kernelPackage: "linux-image-cloud-amd64 (or another linux-image)",
	kernel:        bzImage,
	modules:       []string{"virtio_blk"},
	transports:    []string{"virtio_mmio"},
	model:         "microvm",
	disk:          "virtio-blk-device",
	console:       "ttyS0",
	accelerators: map[Accel]accelerator{
		AccelKVM: {
			name:    AccelKVM,
			accel:   "kvm",
			cpu:     "host",
			devices: []string{kvm.Device},
			cmdline: func() []string { return nil },
		},
		AccelTCG: {
			name:  AccelTCG,
			accel: fmt.Sprintf("tcg,thread=multi,tb-size=%d", translatedMiB),
			// max has RDRAND. Without it mkfs waits seconds for randomness.
			cpu: "max",
			// microvm has no timer that the kernel could calibrate the emulated TSC
			// with. Without this hint it hangs.
			cmdline: func() []string { return []string{fmt.Sprintf("tsc_early_khz=%d", hostKHz())} },
			saves:   true,
		},
	},
}

// machineOf returns the machine of an architecture, or [ErrUnavailable].
func machineOf(arch string) (machine, error) {
	m, ok := machines[arch]
	if !ok {
		return machine{}, missing("run it on "+strings.Join(slices.Sorted(maps.Keys(machines)), " or "),
			"there is no formatting VM for the architecture %s", arch)
	}
	return m, nil
}

var cpuMHz = regexp.MustCompile(`(?m)^cpu MHz\s*:\s*(\d+)`)

// hostKHz is the clock rate of this machine's processor, roughly. The emulated TSC
// counts at that rate, and the guest's clocks are wrong by as much as this number is.
func hostKHz() int {
	b, _ := os.ReadFile("/proc/cpuinfo")
	if m := cpuMHz.FindSubmatch(b); m != nil {
		if mhz, err := strconv.Atoi(string(m[1])); err == nil && mhz > 0 {
			return mhz * 1000
		}
	}
	return 2_000_000
}

// bzImage is the form of x86. QEMU boots the ELF file inside half a second to a second
// sooner than the bzImage around it.
var bzImage = kernelForm{
	ready:   isELF,
	unpack:  unpackBzImage,
	version: bzImageVersion,
}

func isELF(image io.ReaderAt) bool {
	var b [len(elf.ELFMAG)]byte
	_, err := image.ReadAt(b[:], 0)
	return err == nil && string(b[:]) == elf.ELFMAG
}

// bzImageVersion reads the release from a bzImage's header, or from the banner inside a
// vmlinux.
func bzImageVersion(image *io.SectionReader) (string, error) {
	if isELF(image) {
		return bannerVersion(image)
	}
	desc, err := bzimage.KVer(image)
	if err != nil {
		return "", fmt.Errorf("it is neither a bzImage nor an ELF kernel (%w)", err)
	}
	version, _, _ := strings.Cut(desc, " ")
	return version, nil
}
