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
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

var (
	// ErrUnavailable means that something the VM is made of is missing on this
	// machine: QEMU, a kernel, a mkfs, an accelerator. The message names the
	// package that has it.
	ErrUnavailable = errors.New("formatter unavailable")
	// ErrFormat means that the VM ran, or tried to, and the file is not a
	// verified filesystem.
	ErrFormat = errors.New("formatting failed")
	// ErrNoSpace accompanies ErrFormat when the file's filesystem was full.
	ErrNoSpace = errors.New("no space left on the pool")
)

// Accel chooses how the VM's instructions are run.
type Accel string

// The values of [Config.Accel].
const (
	AccelAuto Accel = "auto" // KVM where it works, else TCG
	AccelKVM  Accel = "kvm"  // KVM or an error
	AccelTCG  Accel = "tcg"  // emulation: slower, works everywhere
)

// Config says what the VM is made of. The zero value finds everything on the
// machine.
type Config struct {
	QEMU     string        // QEMU's binary; "" finds qemu-system-x86_64 on PATH
	Kernel   string        // a vmlinuz or vmlinux; "" takes the newest /boot/vmlinuz-* that has modules
	Modules  string        // its module directory; "" is /lib/modules/<its version>
	Init     string        // a binary that calls guest.Main when guest.IsInit; "" is this process's own
	CacheDir string        // where unpacked kernels are kept; "" is csi-disktemplate below the user's cache directory
	Accel    Accel         // "" is AccelAuto
	Timeout  time.Duration // wall clock for one VM; 0 is DefaultTimeout
	UID, GID uint32        // who QEMU runs as when the caller is root; 0 is DefaultUID
}

const (
	// DefaultTimeout is well above the 2–9 s that a format takes under TCG on a
	// loaded two-core machine. It is below the 2 minutes after which kubelet gives
	// a call up, so that a hung VM's error reaches the pod that waits for it.
	DefaultTimeout = 100 * time.Second
	// DefaultUID is a number no distribution gives to a user: above the ranges of
	// adduser(8) and systemd's dynamic users, below those of subuid(5).
	DefaultUID = 65500

	memoryMiB = 256
)

// Report tells how a file was formatted.
type Report struct {
	Fingerprint string
	UUID        string
	Kernel      string        // the guest's release
	Mkfs        string        // the version line of mkfs
	Accelerator Accel         // AccelKVM or AccelTCG
	Boot        time.Duration // on the guest's clock
	Make        time.Duration // mkfs and fsync, likewise
	Check       time.Duration // likewise
	Elapsed     time.Duration // from starting QEMU to its end
}

// Formatter formats files. It may be used by many goroutines at once.
type Formatter struct {
	cfg   Config
	accel func() (Accel, error) // decided once

	mu    sync.Mutex
	memos map[string]*memo // by filesystem
}

// memo holds what is computed once per filesystem. Its lock is held while
// hashing, so that callers of the same filesystem do it once between them.
type memo struct {
	mu     sync.Mutex
	digest string // "" until known
}

// New returns a Formatter. It looks at nothing yet: a machine that lacks a part
// can still serve what was formatted before. [Formatter.Check] looks.
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
	if c.UID == 0 {
		c.UID, c.GID = DefaultUID, DefaultUID
	}
	if c.Init == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		c.Init = self
	}
	if c.CacheDir == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("no directory to keep the unpacked kernel in: %w", err)
		}
		c.CacheDir = filepath.Join(dir, "csi-disktemplate")
	}
	f := &Formatter{cfg: c, memos: map[string]*memo{}}
	f.accel = sync.OnceValues(func() (Accel, error) { return chooseAccel(c.Accel, kvm.Usable) })
	return f, nil
}

// chooseAccel picks the accelerator by what works, not by what is there.
func chooseAccel(want Accel, usable func() error) (Accel, error) {
	if want == AccelTCG {
		return AccelTCG, nil
	}
	err := usable()
	switch {
	case err == nil:
		return AccelKVM, nil
	case want == AccelKVM:
		return "", fmt.Errorf("%w: accelerator kvm was asked for: %w; use --accel=tcg to emulate", ErrUnavailable, err)
	default:
		return AccelTCG, nil
	}
}

// Accelerator reports what VMs run on here, and why KVM is not used when it is
// wanted and does not work.
func (f *Formatter) Accelerator() (accel Accel, whyNotKVM error, err error) {
	accel, err = f.accel()
	if err == nil && accel == AccelTCG && f.cfg.Accel == AccelAuto {
		whyNotKVM = kvm.Usable()
	}
	return accel, whyNotKVM, err
}

// Check reports what is missing on this machine to format every filesystem,
// as [ErrUnavailable].
func (f *Formatter) Check() error {
	var errs []error
	if _, err := f.accel(); err != nil {
		errs = append(errs, err)
	}
	if _, err := f.findQEMU(); err != nil {
		errs = append(errs, err)
	}
	if _, err := f.findKernel(); err != nil {
		errs = append(errs, err)
	}
	for _, name := range diskfs.Names() {
		fs, err := diskfs.Lookup(name)
		if err != nil {
			return err
		}
		for _, tool := range []string{fs.Mkfs, fs.Checker} {
			if _, err := findTool(tool, fs.Package); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Fingerprint returns 16 hex digits that change with anything that decides the
// bytes of a template: the kernel, init, mkfs, the checker, their libraries, the
// modules, the format's options; all by content. The files are read once per
// filesystem and process. Errors are ErrUnavailable or of spec's validation.
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
		m.digest = r.baseDigest()
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

// Format makes file a new, checked and durable filesystem as spec says. file
// must be empty and open for reading and writing; progress, if not nil, is
// called as the work enters each stage. Canceling ctx kills the VM.
//
// The report's fingerprint is of what really ran. Should it differ from what
// Fingerprint said before, the machine's tools were exchanged meanwhile.
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
	m, err := f.plan(r, accel)
	if err != nil {
		return Report{}, err
	}
	if fi, err := file.Stat(); err != nil {
		return Report{}, err
	} else if fi.Size() != 0 {
		return Report{}, fmt.Errorf("%s: formatting needs an empty file, it has %d bytes", file.Name(), fi.Size())
	}
	if err := file.Truncate(spec.Size); err != nil {
		return Report{}, fmt.Errorf("%w: sizing the image to %d bytes: %w", ErrFormat, spec.Size, err)
	}
	if progress == nil {
		progress = func(guest.Stage) {}
	}
	progress(guest.StageBoot)
	if err := failpoint.Before("execve"); err != nil {
		return Report{}, fmt.Errorf("%w: starting QEMU: %w", ErrFormat, err)
	}
	o := m.run(ctx, file, progress)
	if err := o.judge(); err != nil {
		return Report{}, err
	}
	if err := verifyHost(file, spec); err != nil {
		return Report{}, fmt.Errorf("%w: the guest reported success, the host disagrees: %w", ErrFormat, err)
	}
	if err := tmpfile.Sync(file); err != nil {
		return Report{}, noSpace(fmt.Errorf("%w: fsync: %w", ErrFormat, err))
	}
	report := Report{
		Fingerprint: fingerprint(r.baseDigest(), r.job),
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

// verifyHost is the host's own read-only check: every copy of the superblock.
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
	rand.Read(b[:]) // never fails; crypto/rand
	return hex.EncodeToString(b[:])
}
