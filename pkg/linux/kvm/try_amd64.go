// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package kvm

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl numbers and sizes of <linux/kvm.h> and <asm/kvm.h> on x86.
const (
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	exitReasonOffset = 8 // in struct kvm_run
	exitHLT          = 5

	regsSize, rcxOffset, rflagsOffset = 144, 16, 136
	sregsSize                         = 312 // starts with cs: base u64, limit u32, selector u16
	csSelectorOffset                  = 12
)

const (
	// instructions is how many LOOPs the trial guest runs.
	instructions = 20_000
	// slowest is the time they may take. On hardware a LOOP takes 1–11 cycles, so all of
	// them take less than 0.1 ms. A KVM that emulates each was measured at 11 ms
	// (go test -tags system -v ./pkg/linux/kvm). The limit is a factor of ten
	// from both, more than the load of a machine changes.
	slowest = time.Millisecond
	// attempts is how often the guest runs. The fastest run counts, since being descheduled
	// only adds time.
	attempts = 3
)

// try times a guest that executes `loop .` and then `hlt` in real mode.
func try(dev *os.File) error {
	vm, err := unix.IoctlRetInt(int(dev.Fd()), kvmCreateVM)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	defer unix.Close(vm)
	memory, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(memory)
	copy(memory, []byte{0xe2, 0xfe, 0xf4}) // loop . ; hlt

	region := struct {
		slot, flags               uint32
		guestPhys, size, userAddr uint64
	}{size: uint64(len(memory)), userAddr: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if err := ioctl(vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return fmt.Errorf("KVM_SET_USER_MEMORY_REGION: %w", err)
	}
	vcpu, err := unix.IoctlRetInt(vm, kvmCreateVCPU)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VCPU: %w", err)
	}
	defer unix.Close(vcpu)
	size, err := unix.IoctlRetInt(int(dev.Fd()), kvmGetVCPUMmapSize)
	if err != nil {
		return fmt.Errorf("KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	state, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap of the vCPU: %w", err)
	}
	defer unix.Munmap(state)

	best := time.Duration(1<<63 - 1)
	for range attempts {
		took, err := runLoop(vcpu, state)
		if err != nil {
			return err
		}
		if best = min(best, took); best <= slowest {
			return nil
		}
	}
	return fmt.Errorf("%s emulates instructions one by one: %d of them took %s, at most %s is expected of hardware (no vmx or svm in /proc/cpuinfo?)",
		Device, instructions, best.Round(time.Microsecond), slowest)
}

// runLoop starts the guest at address 0 and times it until it halts.
func runLoop(vcpu int, state []byte) (time.Duration, error) {
	var sregs [sregsSize]byte
	if err := ioctl(vcpu, kvmGetSregs, unsafe.Pointer(&sregs)); err != nil {
		return 0, fmt.Errorf("KVM_GET_SREGS: %w", err)
	}
	binary.NativeEndian.PutUint64(sregs[0:], 0)
	binary.NativeEndian.PutUint16(sregs[csSelectorOffset:], 0)
	if err := ioctl(vcpu, kvmSetSregs, unsafe.Pointer(&sregs)); err != nil {
		return 0, fmt.Errorf("KVM_SET_SREGS: %w", err)
	}
	var regs [regsSize]byte
	binary.NativeEndian.PutUint64(regs[rcxOffset:], instructions)
	binary.NativeEndian.PutUint64(regs[rflagsOffset:], 2) // bit 1 is always set
	if err := ioctl(vcpu, kvmSetRegs, unsafe.Pointer(&regs)); err != nil {
		return 0, fmt.Errorf("KVM_SET_REGS: %w", err)
	}
	start := time.Now()
	for {
		err := ioctl(vcpu, kvmRun, nil)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("KVM_RUN: %w", err)
		}
		break
	}
	took := time.Since(start)
	if reason := binary.NativeEndian.Uint32(state[exitReasonOffset:]); reason != exitHLT {
		return 0, fmt.Errorf("the trial guest ended with KVM exit reason %d, not %d (hlt)", reason, exitHLT)
	}
	return took, nil
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
