// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

var (
	// ErrUnavailable means that a part of the VM is missing on this machine: QEMU, a
	// kernel, a mkfs, an accelerator. The message names the package that has it.
	ErrUnavailable = errors.New("formatter unavailable")
	// ErrFormat means that a VM was started, or nearly, and that the file holds no verified
	// filesystem.
	ErrFormat = errors.New("formatting failed")
	// ErrNoSpace accompanies ErrFormat when the filesystem that the file is on was full.
	ErrNoSpace = errors.New("no space left for the image")
	// ErrTooSmall accompanies ErrFormat when the content does not fit into the filesystem.
	ErrTooSmall = errors.New("the volume is too small for its content")
)

// Accel chooses how the VM's instructions are run.
type Accel string

// The values of [Config.Accel].
const (
	AccelAuto Accel = "auto" // KVM where it works, else TCG
	AccelKVM  Accel = "kvm"  // KVM or an error
	AccelTCG  Accel = "tcg"  // emulation: slower, works everywhere
)

// Config says what the VM is made of. The zero value finds everything on this machine.
type Config struct {
	QEMU     string        // QEMU's binary; "" finds the architecture's own on PATH
	Kernel   string        // a vmlinuz or vmlinux; "" takes the newest /boot/vmlinuz-* that has modules
	Modules  string        // its module directory; "" is /lib/modules/<its version>
	Init     string        // a binary of this source that calls guest.Main when guest.IsInit; "" is this process's own
	CacheDir string        // where unpacked kernels are kept, if they can be; "" is csi-disktemplate below the user's cache directory
	Accel    Accel         // "" is AccelAuto
	Timeout  time.Duration // wall clock limit of a VM with one file, and an eighth more for each further one; 0 is DefaultTimeout
	VMs      int           // at the same time; 0 is DefaultVMs
	// Save keeps a VM that has booted in CacheDir, and restores it for later calls, where the
	// accelerator makes that worth while. It takes some 120 MiB for each filesystem, and is not done
	// where less than 2 GiB are free. The files have no names, and end with the process.
	Save bool
}

// DefaultVMs bounds the load on a node when many different disks are asked for at once. A VM takes
// a processor and some hundred MiB of memory.
const DefaultVMs = 2

// MaxOrders is how many files one VM formats.
const MaxOrders = guest.MaxJobs

// DefaultTimeout is well above the 2–9 s that a format takes under TCG on a loaded two-core
// machine. It is below the 2 minutes after which kubelet gives up a call, so that the error
// of a hung VM reaches the pod that waits for it.
const DefaultTimeout = 100 * time.Second

// memoryMiB is the memory of a VM. It bounds the size of an ext4: see its MaxSize in diskfs.
const memoryMiB = 256

// Report says how a file was formatted. The durations follow each other, but for waiting: for a VM
// that is free, and in it for the files that were ahead.
type Report struct {
	Fingerprint string
	UUID        string
	Kernel      string        // the guest's release
	Mkfs        string        // mkfs's version line
	Accelerator Accel         // AccelKVM or AccelTCG
	Restored    bool          // the VM was not booted for this
	Prepare     time.Duration // reading and packing what the VM is made of
	Boot        time.Duration // from the start of QEMU until the guest goes on: a boot, or what it takes to restore one
	Disks       time.Duration // from then until the first mkfs: the disks appear
	Make        time.Duration // mkfs and fsync, on the guest's clock
	Unpack      time.Duration // the content, until it is on the disk, on the guest's clock; 0 without one
	Check       time.Duration // on the guest's clock
	Host        time.Duration // the host's own check, and its fsync
	Elapsed     time.Duration // from the start of QEMU to its end
	Entries     int64         // entries of the content that were unpacked
	Bytes       int64         // of file content in them, without holes
}

// Formatter formats files. It may be used by many goroutines at once.
type Formatter struct {
	cfg   Config
	accel func() (Accel, error) // decides once
	noKVM error                 // why accel decided against KVM, once it did
	queue queue

	unpacking sync.Mutex // held while a kernel is unpacked

	mu     sync.Mutex
	memos  map[string]*memo  // by filesystem
	saved  map[string]*saved // by filesystem
	saving map[string]bool   // by filesystem: a VM that boots is to be saved
}

// memo keeps the digest of a filesystem's files. Its lock is held while they are read, so
// that concurrent callers read them once.
type memo struct {
	mu     sync.Mutex
	digest string // "" until known
}

// New returns a Formatter. It does not look for the VM's parts yet: a machine that lacks one
// can still serve what was formatted before. [Formatter.Conditions] looks.
func New(c Config) (*Formatter, error) {
	switch c.Accel {
	case "":
		c.Accel = AccelAuto
	case AccelAuto, AccelKVM, AccelTCG:
	default:
		return nil, fmt.Errorf("accelerator %q: must be one of auto, kvm, tcg", c.Accel)
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	if c.Init == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		c.Init = self
	}
	if c.CacheDir == "" {
		if dir, err := os.UserCacheDir(); err == nil { // a user without HOME has none
			c.CacheDir = filepath.Join(dir, "csi-disktemplate")
		}
	}
	if c.VMs == 0 {
		c.VMs = DefaultVMs
	}
	f := &Formatter{cfg: c, memos: map[string]*memo{}, saved: map[string]*saved{}, saving: map[string]bool{}}
	f.queue = queue{vms: c.VMs, run: f.run}
	f.accel = sync.OnceValues(func() (Accel, error) {
		return chooseAccel(c.Accel, func() error {
			f.noKVM = kvm.Usable()
			return f.noKVM
		})
	})
	return f, nil
}

// chooseAccel picks KVM only if it works: a device that is there may be unusable.
func chooseAccel(want Accel, usable func() error) (Accel, error) {
	if want == AccelTCG {
		return AccelTCG, nil
	}
	err := usable()
	switch {
	case err == nil:
		return AccelKVM, nil
	case want == AccelKVM:
		return "", missing("use --accel=tcg to emulate", "accelerator kvm was asked for: %w", err)
	default:
		return AccelTCG, nil
	}
}

// Accelerator returns the accelerator that VMs use here. If that is TCG only because KVM
// does not work, whyNotKVM is the reason. KVM is tried once.
func (f *Formatter) Accelerator() (accel Accel, whyNotKVM error, err error) {
	accel, err = f.accel()
	return accel, f.noKVM, err
}

// Fingerprint returns 16 hex digits that change with everything that decides the bytes of a
// template: the content of the kernel, mkfs, the checker, their libraries and the modules, the
// source of init, the format's options, and what the template is to contain. The files are read
// once per filesystem and process.
// Errors are [ErrUnavailable] or those of [diskfs.Spec.Validate].
func (f *Formatter) Fingerprint(spec diskfs.Spec, c *guest.Content) (string, error) {
	if err := spec.Validate(); err != nil {
		return "", err
	}
	f.mu.Lock()
	m := f.memos[spec.Filesystem]
	if m == nil {
		m = &memo{}
		f.memos[spec.Filesystem] = m
	}
	f.mu.Unlock()

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.digest == "" {
		r, err := f.gather(spec.Filesystem)
		if err != nil {
			return "", err
		}
		if m.digest, err = r.baseDigest(); err != nil {
			return "", err
		}
	}
	job, err := newJob(spec, c)
	if err != nil {
		return "", err
	}
	return fingerprint(m.digest, job), nil
}

// forget makes the next Fingerprint read the files again.
func (f *Formatter) forget(filesystem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.memos, filesystem)
}

// Format makes a filesystem in file, as spec says, checks it, and makes it durable. file must
// be empty and open for reading and writing. fill is what to fill it with; with nil it stays
// empty. progress, if not nil, is called as the work enters each stage, and every few seconds
// while the content is unpacked. Canceling ctx kills the VM, unless it also formats for others.
//
// Calls that have to wait for a VM share the next one, if they are of one filesystem. If a VM fails
// that was shared or restored, each file is formatted once more, in a VM of its own that boots.
//
// The report's fingerprint is that of the files that were used. If it differs from what
// Fingerprint returned before, the machine's tools have been replaced meanwhile.
func (f *Formatter) Format(
	ctx context.Context, file *os.File, spec diskfs.Spec, fill *Fill, progress func(guest.Progress),
) (Report, error) {
	if err := spec.Validate(); err != nil {
		return Report{}, err
	}
	if err := fill.check(); err != nil {
		return Report{}, err
	}
	job, err := newJob(spec, fill.content())
	if err != nil {
		return Report{}, err
	}
	o := &order{
		ctx: ctx, file: file, spec: spec, job: job, fill: fill, alone: fill != nil,
		progress: progress, done: make(chan result, 1),
	}
	f.queue.add(o)
	defer context.AfterFunc(ctx, func() {
		if f.queue.leave(o) {
			o.end(Report{}, fmt.Errorf("%w: canceled: %w", ErrFormat, context.Cause(ctx)))
		}
	})()
	r := <-o.done
	if r.err != nil {
		return Report{}, r.err
	}
	return f.accept(file, spec, fill, r.report)
}

// accept is the host's part, once the guest has succeeded.
func (f *Formatter) accept(file *os.File, spec diskfs.Spec, fill *Fill, report Report) (Report, error) {
	start := time.Now()
	if err := verifyHost(file, spec); err != nil {
		return Report{}, fmt.Errorf("%w: the guest reported success, but the host's check failed: %w", ErrFormat, err)
	}
	if err := tmpfile.Sync(file); err != nil {
		return Report{}, noSpace(fmt.Errorf("%w: %w", ErrFormat, err))
	}
	report.Host = time.Since(start)
	if known, err := f.Fingerprint(spec, fill.content()); err == nil && known != report.Fingerprint {
		f.forget(spec.Filesystem)
	}
	return report, nil
}

// run does the orders of one VM.
func (f *Formatter) run(orders []*order) {
	filesystem, fresh := orders[0].spec.Filesystem, orders[0].alone
	begun := time.Now()
	v, err := f.prepare(filesystem, fresh)
	if err != nil {
		for _, o := range orders {
			o.end(Report{}, err)
		}
		return
	}
	defer v.close()
	prepared := time.Since(begun)
	orders = extended(orders)
	if len(orders) == 0 {
		f.keep(filesystem, v, outcome{})
		return
	}
	v.timeout += v.timeout / 8 * time.Duration(len(orders)-1)
	if err := v.give(orders[0].fill); err != nil {
		orders[0].end(Report{}, err)
		return
	}
	out := outcome{exit: failpoint.Before("execve")}
	if out.exit == nil {
		ctx, cancel := whileAnybodyWaits(orders)
		defer cancel()
		out = v.run(ctx, orders)
	}
	out.orders = orders
	f.keep(filesystem, v, out)
	for i, o := range orders {
		one := out.of(i)
		err := one.judge()
		switch {
		case err == nil:
			report := one.report(o, v)
			report.Prepare = prepared
			o.end(report, nil)
		case one.onceMore() && o.reset() == nil:
			klog.InfoS("A formatting VM failed; formatting once more, in a VM of its own", "spec", o.spec.String(), "err", err)
			f.queue.add(o)
		default:
			o.end(Report{}, err)
		}
	}
}

// whileAnybodyWaits returns a context that ends when all callers have given up.
func whileAnybodyWaits(orders []*order) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	var left atomic.Int64
	left.Store(int64(len(orders)))
	var stops []func() bool
	for _, o := range orders {
		stops = append(stops, context.AfterFunc(o.ctx, func() {
			if left.Add(-1) == 0 {
				cancel(context.Cause(o.ctx))
			}
		}))
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
		cancel(nil)
	}
}

// extended gives the files of orders their size, and returns the orders that succeeded.
func extended(orders []*order) (good []*order) {
	for _, o := range orders {
		if err := extend(o.file, o.spec.Size); err != nil {
			o.end(Report{}, err)
			continue
		}
		o.enter(guest.Progress{Stage: guest.StageBoot})
		good = append(good, o)
	}
	return good
}

// prepare decides the VM for a filesystem: one that was saved, or one that boots.
func (f *Formatter) prepare(filesystem string, fresh bool) (*vm, error) {
	accel, err := f.accel()
	if err != nil {
		return nil, err
	}
	if s := f.lookup(filesystem); s != nil && !fresh {
		if v, err := f.restore(s, accel); err == nil {
			return v, nil
		}
	}
	r, err := f.gather(filesystem)
	if err != nil {
		return nil, err
	}
	v, err := f.plan(r, accel)
	if err == nil && !fresh && v.accel.saves && f.cfg.Save {
		f.mayBeSaved(filesystem, v, r)
	}
	return v, err
}

// Spare gives back the space of the VMs that were saved. One that is just being restored fails:
// its files are formatted once more, by a VM that boots. Where there is little space, none is
// saved again.
func (f *Formatter) Spare() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for filesystem, s := range f.saved {
		if err := s.state.Truncate(0); err != nil { // closing would not do while QEMU has it open
			klog.ErrorS(err, "The space of a saved VM is not given back before the plugin ends", "filesystem", filesystem)
		}
		delete(f.saved, filesystem)
	}
}

// lookup returns the saved VM of a filesystem, or nil.
func (f *Formatter) lookup(filesystem string) *saved {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.saved[filesystem]
	if s != nil && s.changed() {
		delete(f.saved, filesystem)
		return nil
	}
	return s
}

// mayBeSaved has a VM saved that is about to boot, unless another one is.
func (f *Formatter) mayBeSaved(filesystem string, v *vm, r *recipe) {
	f.mu.Lock()
	defer f.mu.Unlock()
	parts, err := partsOf(r.sources(v.qemu))
	if err != nil || f.saving[filesystem] {
		return
	}
	v.parts, v.save = parts, savePlace(f.cfg.CacheDir)
	f.saving[filesystem] = v.save != nil
}

// keep takes over a VM that was saved. A VM that failed after it was restored is not used again.
func (f *Formatter) keep(filesystem string, v *vm, out outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	good := out.exit == nil && out.monitor == nil && out.events.shutdown == reasonGuestShutdown
	if v.state != nil && !good && len(out.orders) > 0 {
		delete(f.saved, filesystem)
	}
	if v.save == nil {
		return
	}
	f.saving[filesystem] = false
	if out.saved && good {
		f.saved[filesystem] = &saved{state: v.save, base: v.base, parts: v.parts}
		v.save = nil
	}
}

// extend gives an empty file its size, without space.
func extend(file *os.File, bytes int64) error {
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != 0 {
		return fmt.Errorf("%s: formatting needs an empty file, this one has %s", file.Name(), size.Format(fi.Size()))
	}
	err = file.Truncate(bytes)
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err // the file may have no name that a reader knows
	}
	if err != nil {
		return fmt.Errorf("%w: extending the image to %s: %w", ErrFormat, size.Format(bytes), err)
	}
	return nil
}

// verifyHost is the host's own read-only check of every copy of the superblock.
func verifyHost(file *os.File, spec diskfs.Spec) error {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return err
	}
	_, err = fs.Verify(file, spec.Size, spec.Label)
	return err
}

func newNonce() string {
	var b [16]byte
	rand.Read(b[:]) // crypto/rand: never fails
	return hex.EncodeToString(b[:])
}
