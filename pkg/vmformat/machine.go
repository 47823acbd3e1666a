// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/cage"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/memfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// machine is one VM, decided and not yet started.
type machine struct {
	qemu    string
	accel   Accel
	vmlinux string // path on the node
	initrd  []byte
	nonce   string
	timeout time.Duration
	memory  int    // MiB
	uid     uint32 // of QEMU
	gid     uint32 // of QEMU
	caged   bool   // root only
	werror  string // what QEMU does when a disk fails: "stop"
}

const (
	qemuPackage = "qemu-system-x86"
	qemuName    = "qemu-system-x86_64"

	// Where QEMU finds what it opens by name.
	cagedKernel = "/vmlinux"
	cagedInitrd = "/initrd"
)

// What a caged QEMU may take of the machine. Measured (VmPeak, open descriptors) while
// QEMU 7.2 formats under TCG: 0.62 to 0.65 GiB and 16 for each filesystem at its smallest
// and at 100 GiB, with 6 to 8 threads. It may have 64 more for its disks, with a stack of
// 8 MiB each. Without the two settings it was up to 2.3 GiB, and more with more
// processors: it would reserve 1 GiB for translated code, and 64 MiB for each thread's
// heap.
const (
	qemuAddressSpace = 2 << 30
	qemuFiles        = 64

	translatedMiB = 128
	oneHeap       = "MALLOC_ARENA_MAX=1" // mallopt(3)
)

// Descriptors QEMU inherits, after stdin, stdout and stderr.
const (
	fdTemplate = 3 + iota
	fdVerdict
	fdQMP
	fdInitrd // without a cage only
)

func (f *Formatter) findQEMU() (string, error) {
	if runtime.GOARCH != "amd64" {
		return "", fmt.Errorf("%w: formatting VMs are known for amd64, this is %s", ErrUnavailable, runtime.GOARCH)
	}
	if f.cfg.QEMU == "" {
		return findTool(qemuName, qemuPackage)
	}
	p, err := filepath.EvalSymlinks(f.cfg.QEMU)
	if err == nil {
		p, err = filepath.Abs(p)
	}
	if err != nil {
		return "", fmt.Errorf("%w: --qemu %s: %w; install the package %s", ErrUnavailable, f.cfg.QEMU, err, qemuPackage)
	}
	if filepath.Dir(p) == "/" {
		return "", fmt.Errorf("%w: --qemu %s: must not lie in the root directory, which QEMU's cage hides; move it to one of its own", ErrUnavailable, p)
	}
	return p, nil
}

// plan decides the machine for a recipe.
func (f *Formatter) plan(r *recipe, accel Accel) (*machine, error) {
	qemu, err := f.findQEMU()
	if err != nil {
		return nil, err
	}
	vmlinux, err := r.kernel.vmlinux(f.cfg.CacheDir)
	if err != nil {
		return nil, err
	}
	initrd, err := r.initramfs()
	if err != nil {
		return nil, err
	}
	return &machine{
		qemu:    qemu,
		accel:   accel,
		vmlinux: vmlinux,
		initrd:  initrd,
		nonce:   newNonce(),
		timeout: f.cfg.Timeout,
		memory:  memoryMiB,
		uid:     f.cfg.UID,
		gid:     f.cfg.GID,
		caged:   os.Geteuid() == 0,
		werror:  "stop",
	}, nil
}

// args is QEMU's command line, the same for both accelerators but for the
// accelerator itself.
func (m *machine) args() []string {
	kernel, initrd := cagedKernel, cagedInitrd
	if !m.caged {
		kernel, initrd = m.vmlinux, fmt.Sprintf("/proc/self/fd/%d", fdInitrd)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "microvm", "-m", strconv.Itoa(m.memory), "-smp", "1",
		"-kernel", kernel, "-initrd", initrd, "-append", m.cmdline(),
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", fdQMP), "-mon", "chardev=qmp,mode=control",
		"-chardev", "stdio,id=con,signal=off", "-serial", "chardev:con",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
	if m.accel == AccelKVM {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		// max has RDRAND: without it mkfs waits seconds for randomness.
		args = append(args, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", translatedMiB), "-cpu", "max")
	}
	args = append(args, m.disk(fdTemplate, 1, guest.TemplateSerial)...)
	return append(args, m.disk(fdVerdict, 2, guest.VerdictSerial)...)
}

// disk attaches an inherited descriptor as a virtio disk.
//
// QEMU never flushes: the host syncs the file once, at the end. write-zeroes=off
// keeps mkfs from allocating what it means to leave sparse. A write error stops
// the machine, so that the guest never sees a success that was none.
func (m *machine) disk(fd, set int, serial string) []string {
	return []string{
		"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, set),
		"-blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=/dev/fdset/%d,locking=off,cache.no-flush=on,discard=unmap", set, set),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,file=f%d,cache.no-flush=on,discard=unmap,detect-zeroes=unmap", set, set),
		"-device", fmt.Sprintf("virtio-blk-device,drive=d%d,serial=%s,write-zeroes=off,werror=%s,rerror=stop", set, serial, m.werror),
	}
}

// cmdline is the kernel's: a panic ends the VM at once (panic=-1 with
// -no-reboot), and what follows "--" goes to init.
func (m *machine) cmdline() string {
	words := []string{"console=ttyS0", "quiet", "panic=-1", "cryptomgr.notests"}
	if m.accel == AccelTCG {
		// microvm has no timer that the kernel could calibrate the emulated TSC
		// with: without a hint it hangs.
		words = append(words, fmt.Sprintf("tsc_early_khz=%d", hostKHz()))
	}
	return strings.Join(append(words, "--", guest.NonceArg+m.nonce), " ")
}

var cpuMHz = regexp.MustCompile(`(?m)^cpu MHz\s*:\s*(\d+)`)

// hostKHz is the clock the emulated TSC counts, roughly: the guest's sense of
// time is off by as much as this is.
func hostKHz() int {
	b, _ := os.ReadFile("/proc/cpuinfo")
	if m := cpuMHz.FindSubmatch(b); m != nil {
		if mhz, err := strconv.Atoi(string(m[1])); err == nil && mhz > 0 {
			return mhz * 1000
		}
	}
	return 2_000_000
}

// cageSpec gives QEMU its own files and libraries and nothing else.
func (m *machine) cageSpec() cage.Spec {
	s := cage.System()
	s.UID, s.GID = m.uid, m.gid
	// One processor for the guest and one for all else, for as long as it may take: this
	// ends a QEMU whose plugin hangs.
	s.Limits = cage.Limits{Memory: qemuAddressSpace, CPU: 2 * m.timeout, Files: qemuFiles}
	s.Binds[cagedKernel] = m.vmlinux
	s.Files[cagedInitrd] = m.initrd
	if m.accel == AccelKVM {
		s.Devices = append(s.Devices, kvm.Device)
	}
	if !strings.HasPrefix(m.qemu, "/usr/") {
		// Its firmware lies beside it: /opt/qemu/bin/… needs /opt/qemu/share.
		dir := filepath.Dir(filepath.Dir(m.qemu))
		if dir == "/" {
			dir = filepath.Dir(m.qemu)
		}
		s.Binds[dir] = dir
	}
	return s
}

// run boots the machine and watches it until it is gone.
func (m *machine) run(ctx context.Context, template *os.File, progress func(guest.Stage)) outcome {
	o := outcome{nonce: m.nonce, timeout: m.timeout}
	verdict, err := memfile.New("verdict", make([]byte, guest.VerdictSize))
	if err != nil {
		o.exit = err
		return o
	}
	defer verdict.Close()
	ours, theirs, err := socketpair()
	if err != nil {
		o.exit = err
		return o
	}
	defer ours.Close()
	defer theirs.Close()
	files := []*os.File{fdTemplate - 3: template, fdVerdict - 3: verdict, fdQMP - 3: theirs}
	if !m.caged {
		initrd, err := memfile.New("initrd", m.initrd)
		if err != nil {
			o.exit = err
			return o
		}
		defer initrd.Close()
		files = append(files, initrd)
	}

	deadline, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	con := &console{progress: progress}
	cmd := exec.CommandContext(deadline, m.qemu, m.args()...)
	cmd.Stdout, cmd.Stderr = con, con
	cmd.ExtraFiles = files
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", oneHeap}

	// The monitor ends when QEMU has closed its end, which it does by exiting,
	// and the parent's copy is closed too.
	var watch errgroup.Group
	watch.Go(func() error {
		o.events, o.monitor = monitor(ours)
		return nil
	})
	start := time.Now()
	o.exit = m.start(cmd)
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
		o.verdict, o.noVerdict = guest.ParseVerdict(b, m.nonce)
	}
	return o
}

// start runs QEMU to its end, in a cage where the caller may build one.
func (m *machine) start(cmd *exec.Cmd) error {
	if m.caged {
		return cage.Run(cmd, m.cageSpec(), nil)
	}
	// The parent-death signal follows the thread that forked: keep it.
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

// console collects what the VM prints and spots the stages in it.
type console struct {
	progress func(guest.Stage)

	mu    sync.Mutex
	lines []string
	part  []byte
	panic string
}

const (
	consoleLines = 20   // as many as an error shows
	consoleWidth = 1024 // bytes of one line that are kept
)

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range b {
		switch {
		case ch == '\n':
			c.line(string(c.part))
			c.part = c.part[:0]
		case ch != '\r' && len(c.part) < consoleWidth:
			c.part = append(c.part, ch)
		}
	}
	return len(b), nil
}

// line takes one line. It may have any bytes, or end within a character, and becomes
// part of errors, which are UTF-8.
func (c *console) line(s string) {
	s = strings.ToValidUTF8(s, "?")
	if stage, ok := guest.ParseStage(s); ok {
		c.progress(stage)
		return
	}
	if c.panic == "" && strings.Contains(s, "Kernel panic") {
		c.panic = strings.TrimSpace(s)
	}
	if s = strings.TrimSpace(s); s != "" {
		c.lines = append(c.lines, s)
	}
	if len(c.lines) > consoleLines {
		c.lines = c.lines[1:]
	}
}

// last returns the last lines printed, and the line of a kernel panic, which
// a backtrace pushes out of them.
func (c *console) last() (lines []string, panic string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.part) > 0 {
		c.line(string(c.part))
		c.part = nil
	}
	return c.lines, c.panic
}
