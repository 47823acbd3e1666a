// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/memfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// vm is one VM, decided and not yet started.
type vm struct {
	machine machine
	accel   accelerator
	qemu    string // path of QEMU
	kernel  bootable
	initrd  *os.File // a memfile, whose offset is 0
	state   *os.File // of a VM that was saved, at its beginning; then there is neither kernel nor initrd
	save    *os.File // where the VM is saved once it has booted; nil if it is not
	content *os.File // the archives of an order with a fill, for reading; nil if there are none
	base    string   // base digest of the files in initrd
	parts   []part   // what the VM is made of, if it is to be saved
	nonce   string   // names the VM; the nonces of its orders begin with it
	timeout time.Duration
	boot    time.Duration // how much of that it may take until the guest is ready
	memory  int           // MiB
	caged   bool          // only root can build a cage
	werror  string        // what QEMU does when a disk fails: "stop", but for tests
}

// qemuUID and qemuGID are who QEMU runs as when the caller is root. It is a number that
// no distribution gives to a user: above the ranges of adduser(8) and of systemd's dynamic
// users, below those of subuid(5).
const qemuUID, qemuGID = 65500, 65500

// Where QEMU finds the files that it opens by name, in its cage.
const (
	cagedKernel = "/vmlinux"
	cagedInitrd = "/initrd"
)

// Limits of a caged QEMU. Measured (VmPeak, open descriptors) while QEMU 7.2 formats under
// TCG: 0.62 to 0.65 GiB and 16 descriptors for each filesystem, at its smallest size and
// at 100 GiB, with 6 to 8 threads. Each further disk takes two descriptors. QEMU may start 64 more threads for its disks, with a
// stack of 8 MiB each.
//
// Without the last two settings QEMU took up to 2.3 GiB, and more on a machine with more
// processors: it would reserve 1 GiB for translated code, and 64 MiB for each thread's
// heap.
const (
	qemuAddressSpace = 2 << 30 // with memoryMiB of memory; a VM with more has as much more of this
	qemuFiles        = 128

	translatedMiB = 128
	oneHeap       = "MALLOC_ARENA_MAX=1" // mallopt(3)
)

// Descriptors that QEMU inherits, after stdin, stdout and stderr. Those of the templates come
// first.
const fdTemplates = 3

// inherited are these descriptors, in their order.
type inherited struct {
	templates       int
	files           []*os.File
	control, qmp    int
	content         int // only of an order with a fill
	state           int // to restore from
	initrd, vmlinux int // without a cage only; vmlinux only if the kernel is in memory
}

// add appends a file, and returns the descriptor that QEMU has of it.
func (h *inherited) add(f *os.File) int {
	h.files = append(h.files, f)
	return fdTemplates + len(h.files) - 1
}

// inherit decides what QEMU inherits.
func (v *vm) inherit(templates []*os.File, control, qmp *os.File) *inherited {
	h := &inherited{templates: len(templates), files: slices.Clone(templates)}
	h.control, h.qmp = h.add(control), h.add(qmp)
	if v.content != nil {
		h.content = h.add(v.content)
	}
	switch {
	case v.state != nil:
		h.state = h.add(v.state)
	case !v.caged:
		h.initrd = h.add(v.initrd)
		if v.kernel.memory != nil {
			h.vmlinux = h.add(v.kernel.memory)
		}
	}
	return h
}

// findQEMU returns the path of the machine's QEMU, or of the configured one.
func (f *Formatter) findQEMU(m machine) (string, error) {
	if f.cfg.QEMU == "" {
		return findTool(m.qemu, m.qemuPackage)
	}
	p, err := filepath.EvalSymlinks(f.cfg.QEMU)
	if err == nil {
		p, err = filepath.Abs(p)
	}
	if err != nil {
		return "", missing("install the package "+m.qemuPackage, "--qemu %s: %w", f.cfg.QEMU, err)
	}
	if filepath.Dir(p) == "/" {
		return "", missing("move it to a directory of its own", "--qemu %s: QEMU's cage hides the files in the root directory", p)
	}
	return p, nil
}

// newVM decides what all VMs have in common.
func (f *Formatter) newVM(accel Accel) (*vm, error) {
	m, err := machineOf(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	qemu, err := f.findQEMU(m)
	if err != nil {
		return nil, err
	}
	return &vm{
		machine: m,
		accel:   m.accelerators[accel],
		qemu:    qemu,
		nonce:   newNonce(),
		timeout: f.cfg.Timeout,
		boot:    f.cfg.Timeout,
		memory:  memoryMiB,
		caged:   os.Geteuid() == 0,
		werror:  "stop",
	}, nil
}

// plan decides the VM that boots a recipe. The caller closes it.
func (f *Formatter) plan(r *recipe, accel Accel) (*vm, error) {
	v, err := f.newVM(accel)
	if err != nil {
		return nil, err
	}
	if v.kernel, err = f.unpacked(r.kernel); err != nil {
		return nil, err
	}
	if v.initrd, err = memfile.New("initrd"); err == nil {
		v.base, err = r.initramfs(v.initrd)
	}
	if err == nil {
		_, err = v.initrd.Seek(0, io.SeekStart)
	}
	if err != nil {
		v.close()
		return nil, err
	}
	return v, nil
}

// restore decides the VM that goes on where another one was saved. The caller closes it.
func (f *Formatter) restore(s *saved, accel Accel) (*vm, error) {
	v, err := f.newVM(accel)
	if err != nil {
		return nil, err
	}
	v.base = s.base
	v.state, err = again(s.state)
	return v, err
}

// unpacked is [kernel.unpacked] for one caller at a time: the next finds what the first kept, and
// there is one decompressor in memory.
func (f *Formatter) unpacked(k kernel) (bootable, error) {
	f.unpacking.Lock()
	defer f.unpacking.Unlock()
	return k.unpacked(f.cfg.CacheDir)
}

// close drops what is in memory. A cage that was built has dropped it already.
func (v *vm) close() {
	for _, f := range []*os.File{v.kernel.memory, v.initrd, v.state, v.save, v.content} {
		if f != nil {
			f.Close()
		}
	}
}

// args is QEMU's command line.
func (v *vm) args(h *inherited) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "disktemplate-" + v.nonce,
		"-M", v.machine.model, "-m", strconv.Itoa(v.memory), "-smp", "1",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", h.qmp), "-mon", "chardev=qmp,mode=control",
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", v.accel.accel, "-cpu", v.accel.cpu,
	}
	args = append(args, v.origin(h)...)
	args = append(args, inheritedDisk(h.control)...)
	args = append(args, v.disk(h.control, guest.ControlSerial)...)
	disks := guest.MaxJobs
	if h.content > 0 {
		disks = h.templates // this VM is never saved, so it need not be like others
		args = append(args, contentDisk(h.content)...)
		args = append(args, v.disk(h.content, guest.ContentSerial)...)
	}
	for i := range disks {
		at := fdTemplates + i
		if i < h.templates {
			args = append(args, inheritedDisk(at)...)
		} else {
			at += fdEmpty
			args = append(args, "-blockdev", fmt.Sprintf("driver=null-co,node-name=d%d,size=%d,read-zeroes=on", at, diskfs.MiB))
		}
		args = append(args, v.disk(at, guest.Disk(i))...)
	}
	return args
}

// fdEmpty makes the names of empty disks differ from those of inherited ones.
const fdEmpty = 100

// origin is where the VM comes from: a kernel that boots, or a VM that was saved.
func (v *vm) origin(h *inherited) []string {
	if v.state != nil {
		return []string{"-incoming", fmt.Sprintf("fd:%d", h.state)}
	}
	kernel, initrd := cagedKernel, cagedInitrd
	if !v.caged {
		kernel, initrd = v.kernel.path, fmt.Sprintf("/proc/self/fd/%d", h.initrd)
		if kernel == "" {
			kernel = fmt.Sprintf("/proc/self/fd/%d", h.vmlinux)
		}
	}
	return []string{"-kernel", kernel, "-initrd", initrd, "-append", v.cmdline()}
}

// inheritedDisk makes an inherited descriptor a block node of QEMU.
//
// QEMU never flushes, since the host syncs the file once, at the end.
func inheritedDisk(fd int) []string {
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%[1]d", fd),
		"-blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=/dev/fdset/%[1]d,locking=off,cache.no-flush=on,discard=unmap", fd),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,file=f%[1]d,cache.no-flush=on,discard=unmap,detect-zeroes=unmap", fd),
	}
}

// contentDisk makes the descriptor with a content's archives a block node that is only read.
func contentDisk(fd int) []string {
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%[1]d", fd),
		"-blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=/dev/fdset/%[1]d,locking=off,read-only=on", fd),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,file=f%[1]d,read-only=on", fd),
	}
}

// disk attaches a block node as a virtio disk. The disks of templates are all there in each VM,
// with a job or without: a saved VM can be restored only to the same machine.
//
// write-zeroes=off keeps mkfs from allocating what it means to leave sparse. A write error stops
// the VM, so that the guest never sees a success that was none.
func (v *vm) disk(node int, serial string) []string {
	return []string{"-device", fmt.Sprintf("%s,drive=d%d,serial=%s,write-zeroes=off,werror=%s,rerror=stop", v.machine.disk, node, serial, v.werror)}
}

// cmdline is the kernel's command line. A panic ends the VM at once (panic=-1 with
// -no-reboot).
func (v *vm) cmdline() string {
	words := []string{"console=" + v.machine.console, "quiet", "panic=-1", "cryptomgr.notests"}
	return strings.Join(append(words, v.accel.cmdline()...), " ")
}

// cageSpec gives QEMU its own files and libraries and nothing else.
func (v *vm) cageSpec() cage.Spec {
	s := cage.System()
	s.UID, s.GID = qemuUID, qemuGID
	// CPU is enough for one processor for the guest and one for all else until the deadline.
	// The limit ends a QEMU whose plugin hangs.
	s.Limits = cage.Limits{Memory: v.addressSpace(), CPU: 2 * v.timeout, Files: qemuFiles}
	if v.state == nil {
		if v.kernel.path == "" {
			s.Files[cagedKernel] = v.kernel.memory
		} else {
			s.Binds[cagedKernel] = v.kernel.path
		}
		s.Files[cagedInitrd] = v.initrd
	}
	s.Devices = append(s.Devices, v.accel.devices...)
	if !strings.HasPrefix(v.qemu, "/usr/") {
		// QEMU's firmware lies beside it: /opt/qemu/bin/… needs /opt/qemu/share.
		dir := filepath.Dir(filepath.Dir(v.qemu))
		if dir == "/" {
			dir = filepath.Dir(v.qemu)
		}
		s.Binds[dir] = dir
	}
	return s
}

// run boots or restores the VM, has it do its orders, and watches it until it has ended.
func (v *vm) run(ctx context.Context, orders []*order) outcome {
	o := outcome{orders: orders, timeout: v.timeout}
	control, err := v.control(orders)
	if err != nil {
		o.exit = err
		return o
	}
	defer control.Close()
	ours, theirs, err := socketpair()
	if err != nil {
		o.exit = err
		return o
	}
	defer ours.Close()
	defer theirs.Close()
	stdin, input, err := os.Pipe()
	if err != nil {
		o.exit = err
		return o
	}
	defer stdin.Close()
	defer input.Close()
	var templates []*os.File
	for _, order := range orders {
		templates = append(templates, order.file)
	}
	h := v.inherit(templates, control, theirs)

	deadline, cancel := context.WithTimeout(ctx, v.timeout)
	defer cancel()
	begun := &start{qmp: ours, console: input, restored: v.state != nil, save: v.save}
	con := &console{progress: func(p guest.Progress, job int) {
		switch {
		case p.Stage == guest.StageReady:
			begun.onReady()
		case job < len(orders):
			orders[job].enter(p)
		}
	}}
	// A VM that unpacks much has much time, and none of it is for one that hangs while it boots.
	booting, stop := context.WithCancelCause(deadline)
	defer stop(nil)
	defer time.AfterFunc(v.boot, func() {
		if !begun.isReady() {
			stop(errBoot)
		}
	}).Stop()
	cmd := exec.CommandContext(booting, v.qemu, v.args(h)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, con, con
	cmd.ExtraFiles = h.files
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", oneHeap}

	// The monitor ends when both copies of QEMU's end are closed: QEMU's own, when it exits,
	// and the one of this process.
	var watch errgroup.Group
	watch.Go(func() error {
		o.events, o.monitor = monitor(ours, begun.onMonitor)
		return nil
	})
	o.start = time.Now()
	o.exit = v.start(cmd)
	o.elapsed = time.Since(o.start)
	theirs.Close()
	watch.Wait()

	o.timedOut = booting.Err() != nil && ctx.Err() == nil && o.exit != nil
	if o.stuck = o.timedOut && deadline.Err() == nil; o.stuck {
		o.timeout = v.boot
	}
	o.canceled = context.Cause(ctx)
	o.console, o.panic = con.last()
	o.saved, o.ready, o.restored = begun.saved, begun.ready.Sub(o.start), begun.restored
	o.control = make([]byte, guest.ControlSize)
	if _, err := control.ReadAt(o.control, 0); err != nil {
		o.control = nil
	}
	return o
}

var errBoot = errors.New("the VM did not boot in time")

// control makes the disk with the batch.
func (v *vm) control(orders []*order) (*os.File, error) {
	seed := make([]byte, 32)
	rand.Read(seed) // crypto/rand: never fails
	batch := guest.Batch{Seed: seed, Time: time.Now().UnixNano()}
	for i, o := range orders {
		o.nonce = fmt.Sprintf("%s-%d", v.nonce, i)
		batch.Orders = append(batch.Orders, guest.Order{Nonce: o.nonce, Job: o.job, Layers: o.fill.layers()})
	}
	b, err := batch.Marshal()
	if err != nil {
		return nil, err
	}
	f, err := memfile.New("control")
	if err != nil {
		return nil, err
	}
	if _, err = f.WriteAt(b, 0); err == nil {
		err = f.Truncate(guest.ControlSize)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// start runs QEMU to its end, in a cage if the caller may build one.
func (v *vm) start(cmd *exec.Cmd) error {
	if v.caged {
		return cage.Run(cmd, v.cageSpec())
	}
	// The parent-death signal comes when the thread that forked ends, so keep that thread.
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		result <- cmd.Run()
	}()
	return <-result
}

func socketpair() (a, b *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "qmp"), os.NewFile(uintptr(fds[1]), "qmp"), nil
}
