// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

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
	base    string   // base digest of the files in initrd
	nonce   string
	timeout time.Duration
	memory  int    // MiB
	caged   bool   // only root can build a cage
	werror  string // what QEMU does when a disk fails: "stop", but for tests
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
// at 100 GiB, with 6 to 8 threads. QEMU may start 64 more threads for its disks, with a
// stack of 8 MiB each.
//
// Without the last two settings QEMU took up to 2.3 GiB, and more on a machine with more
// processors: it would reserve 1 GiB for translated code, and 64 MiB for each thread's
// heap.
const (
	qemuAddressSpace = 2 << 30
	qemuFiles        = 64

	translatedMiB = 128
	oneHeap       = "MALLOC_ARENA_MAX=1" // mallopt(3)
)

// Descriptors that QEMU inherits, after stdin, stdout and stderr.
const (
	fdTemplate = 3 + iota
	fdVerdict
	fdQMP
	fdInitrd // without a cage only
	fdKernel // without a cage only, and if the kernel is in memory
)

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

// plan decides the VM for a recipe. The caller closes it.
func (f *Formatter) plan(r *recipe, accel Accel) (*vm, error) {
	qemu, err := f.findQEMU(r.machine)
	if err != nil {
		return nil, err
	}
	v := &vm{
		machine: r.machine,
		accel:   r.machine.accelerators[accel],
		qemu:    qemu,
		nonce:   newNonce(),
		timeout: f.cfg.Timeout,
		memory:  memoryMiB,
		caged:   os.Geteuid() == 0,
		werror:  "stop",
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

// unpacked is [kernel.unpacked] for one caller at a time: the next finds what the first kept, and
// there is one decompressor in memory.
func (f *Formatter) unpacked(k kernel) (bootable, error) {
	f.unpacking.Lock()
	defer f.unpacking.Unlock()
	return k.unpacked(f.cfg.CacheDir)
}

// close drops what is in memory. A cage that was built has dropped it already.
func (v *vm) close() {
	for _, f := range []*os.File{v.kernel.memory, v.initrd} {
		if f != nil {
			f.Close()
		}
	}
}

// args is QEMU's command line.
func (v *vm) args() []string {
	kernel, initrd := cagedKernel, cagedInitrd
	if !v.caged {
		kernel, initrd = v.kernel.path, fmt.Sprintf("/proc/self/fd/%d", fdInitrd)
		if kernel == "" {
			kernel = fmt.Sprintf("/proc/self/fd/%d", fdKernel)
		}
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", v.machine.model, "-m", strconv.Itoa(v.memory), "-smp", "1",
		"-kernel", kernel, "-initrd", initrd, "-append", v.cmdline(),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP), "-mon", "chardev=qmp,mode=control",
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", v.accel.accel, "-cpu", v.accel.cpu,
	}
	args = append(args, v.disk(fdTemplate, 1, guest.TemplateSerial)...)
	return append(args, v.disk(fdVerdict, 2, guest.VerdictSerial)...)
}

// disk attaches an inherited descriptor as a virtio disk.
//
// QEMU never flushes, since the host syncs the file once, at the end. write-zeroes=off
// keeps mkfs from allocating what it means to leave sparse. A write error stops the VM, so
// that the guest never sees a success that was none.
func (v *vm) disk(fd, set int, serial string) []string {
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, set),
		"-blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=/dev/fdset/%d,locking=off,cache.no-flush=on,discard=unmap", set, set),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,file=f%d,cache.no-flush=on,discard=unmap,detect-zeroes=unmap", set, set),
		"-device", fmt.Sprintf("%s,drive=d%d,serial=%s,write-zeroes=off,werror=%s,rerror=stop", v.machine.disk, set, serial, v.werror),
	}
}

// cmdline is the kernel's command line. A panic ends the VM at once (panic=-1 with
// -no-reboot). The kernel hands the words after "--" to init.
func (v *vm) cmdline() string {
	words := []string{"console=" + v.machine.console, "quiet", "panic=-1", "cryptomgr.notests"}
	words = append(words, v.accel.cmdline()...)
	return strings.Join(append(words, "--", guest.NonceArg+v.nonce), " ")
}

// cageSpec gives QEMU its own files and libraries and nothing else.
func (v *vm) cageSpec() cage.Spec {
	s := cage.System()
	s.UID, s.GID = qemuUID, qemuGID
	// CPU is enough for one processor for the guest and one for all else until the deadline.
	// The limit ends a QEMU whose plugin hangs.
	s.Limits = cage.Limits{Memory: qemuAddressSpace, CPU: 2 * v.timeout, Files: qemuFiles}
	if v.kernel.path == "" {
		s.Files[cagedKernel] = v.kernel.memory
	} else {
		s.Binds[cagedKernel] = v.kernel.path
	}
	s.Files[cagedInitrd] = v.initrd
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

// run boots the VM and watches it until it has ended.
func (v *vm) run(ctx context.Context, template *os.File, progress func(guest.Stage)) outcome {
	o := outcome{nonce: v.nonce, timeout: v.timeout}
	verdict, err := memfile.New("verdict")
	if err == nil {
		defer verdict.Close()
		err = verdict.Truncate(guest.VerdictSize)
	}
	if err != nil {
		o.exit = err
		return o
	}
	ours, theirs, err := socketpair()
	if err != nil {
		o.exit = err
		return o
	}
	defer ours.Close()
	defer theirs.Close()
	files := []*os.File{fdTemplate - 3: template, fdVerdict - 3: verdict, fdQMP - 3: theirs}
	if !v.caged {
		files = append(files, v.initrd) // fdInitrd
		if v.kernel.memory != nil {
			files = append(files, v.kernel.memory) // fdKernel
		}
	}

	deadline, cancel := context.WithTimeout(ctx, v.timeout)
	defer cancel()
	con := &console{progress: progress}
	cmd := exec.CommandContext(deadline, v.qemu, v.args()...)
	cmd.Stdout, cmd.Stderr = con, con
	cmd.ExtraFiles = files
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", oneHeap}

	// The monitor ends when both copies of QEMU's end are closed: QEMU's own, when it exits,
	// and the one of this process.
	var watch errgroup.Group
	watch.Go(func() error {
		o.events, o.monitor = monitor(ours)
		return nil
	})
	start := time.Now()
	o.exit = v.start(cmd)
	o.elapsed = time.Since(start)
	theirs.Close()
	watch.Wait()

	o.timedOut = deadline.Err() != nil && ctx.Err() == nil && o.exit != nil
	o.canceled = context.Cause(ctx)
	o.console, o.panic = con.last()
	b := make([]byte, guest.VerdictSize)
	if _, err := verdict.ReadAt(b, 0); err != nil {
		o.noVerdict = err
	} else {
		o.verdict, o.noVerdict = guest.ParseVerdict(b, v.nonce)
	}
	return o
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
