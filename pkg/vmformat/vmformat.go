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
	"time"

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
	Timeout  time.Duration // wall clock limit of one VM; 0 is DefaultTimeout
}

// DefaultTimeout is well above the 2–9 s that a format takes under TCG on a loaded two-core
// machine. It is below the 2 minutes after which kubelet gives up a call, so that the error
// of a hung VM reaches the pod that waits for it.
const DefaultTimeout = 100 * time.Second

// memoryMiB is the memory of a VM. It bounds the size of an ext4: see its MaxSize in diskfs.
const memoryMiB = 256

// Report says how a file was formatted.
type Report struct {
	Fingerprint string
	UUID        string
	Kernel      string        // the guest's release
	Mkfs        string        // mkfs's version line
	Accelerator Accel         // AccelKVM or AccelTCG
	Boot        time.Duration // on the guest's clock
	Make        time.Duration // mkfs and fsync, on the guest's clock
	Check       time.Duration // on the guest's clock
	Elapsed     time.Duration // from the start of QEMU to its end
}

// Formatter formats files. It may be used by many goroutines at once.
type Formatter struct {
	cfg   Config
	accel func() (Accel, error) // decides once

	unpacking sync.Mutex // held while a kernel is unpacked

	mu    sync.Mutex
	memos map[string]*memo // by filesystem
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
	f := &Formatter{cfg: c, memos: map[string]*memo{}}
	f.accel = sync.OnceValues(func() (Accel, error) { return chooseAccel(c.Accel, kvm.Usable) })
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
// does not work, whyNotKVM is the reason.
func (f *Formatter) Accelerator() (accel Accel, whyNotKVM error, err error) {
	accel, err = f.accel()
	if err == nil && accel == AccelTCG && f.cfg.Accel == AccelAuto {
		whyNotKVM = kvm.Usable()
	}
	return accel, whyNotKVM, err
}

// Fingerprint returns 16 hex digits that change with everything that decides the bytes of a
// template: the content of the kernel, mkfs, the checker, their libraries and the modules, the
// source of init, and the format's options. The files are read once per filesystem and process.
// Errors are [ErrUnavailable] or those of [diskfs.Spec.Validate].
func (f *Formatter) Fingerprint(spec diskfs.Spec) (string, error) {
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
		r, err := f.gather(spec)
		if err != nil {
			return "", err
		}
		if m.digest, err = r.baseDigest(); err != nil {
			return "", err
		}
	}
	job, err := newJob(spec, nil)
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
// be empty and open for reading and writing. progress, if not nil, is called as the work
// enters each stage. Canceling ctx kills the VM.
//
// The report's fingerprint is that of the files that were used. If it differs from what
// Fingerprint returned before, the machine's tools have been replaced meanwhile.
func (f *Formatter) Format(ctx context.Context, file *os.File, spec diskfs.Spec, progress func(guest.Stage)) (Report, error) {
	if err := spec.Validate(); err != nil {
		return Report{}, err
	}
	accel, err := f.accel()
	if err != nil {
		return Report{}, err
	}
	r, err := f.gather(spec)
	if err != nil {
		return Report{}, err
	}
	v, err := f.plan(r, accel)
	if err != nil {
		return Report{}, err
	}
	defer v.close()
	if fi, err := file.Stat(); err != nil {
		return Report{}, err
	} else if fi.Size() != 0 {
		return Report{}, fmt.Errorf("%s: formatting needs an empty file, this one has %s", file.Name(), size.Format(fi.Size()))
	}
	if err := extend(file, spec.Size); err != nil {
		return Report{}, err
	}
	if progress == nil {
		progress = func(guest.Stage) {}
	}
	progress(guest.StageBoot)
	if err := failpoint.Before("execve"); err != nil {
		return Report{}, fmt.Errorf("%w: starting QEMU: %w", ErrFormat, err)
	}
	o := v.run(ctx, file, progress)
	if err := o.judge(); err != nil {
		return Report{}, err
	}
	if err := verifyHost(file, spec); err != nil {
		return Report{}, fmt.Errorf("%w: the guest reported success, but the host's check failed: %w", ErrFormat, err)
	}
	if err := tmpfile.Sync(file); err != nil {
		return Report{}, noSpace(fmt.Errorf("%w: %w", ErrFormat, err))
	}
	report := Report{
		Fingerprint: fingerprint(v.base, r.job),
		UUID:        o.verdict.UUID,
		Kernel:      o.verdict.Kernel,
		Mkfs:        o.verdict.Mkfs,
		Accelerator: accel,
		Boot:        time.Duration(o.verdict.BootMS) * time.Millisecond,
		Make:        time.Duration(o.verdict.MkfsMS) * time.Millisecond,
		Check:       time.Duration(o.verdict.CheckMS) * time.Millisecond,
		Elapsed:     o.elapsed,
	}
	if known, err := f.Fingerprint(spec); err == nil && known != report.Fingerprint {
		f.forget(spec.Filesystem)
	}
	return report, nil
}

// extend gives an empty file its size, without space.
func extend(file *os.File, bytes int64) error {
	err := file.Truncate(bytes)
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
