// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package vmformat

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// kit is a recipe and a job that a test may tamper with.
type kit struct {
	*recipe
	job *guest.Job
}

// broken prepares a VM that boots and makes an ext4 of 64 MiB, and lets a test break it.
func broken(t *testing.T, tamper func(kit), damage func(*vm)) (*vm, *order) {
	t.Helper()
	testenv.Root(t)
	f := newFormatter(t, nil)
	spec := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	r, err := f.gather(spec.Filesystem)
	if err != nil {
		t.Fatal(err)
	}
	job, err := newJob(spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	if tamper != nil {
		tamper(kit{r, &job})
	}
	v, err := f.plan(r, AccelTCG)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.close)
	if damage != nil {
		damage(v)
	}
	file := image(t, testenv.Dir(t))
	if err := file.Truncate(spec.Size); err != nil {
		t.Fatal(err)
	}
	return v, &order{ctx: t.Context(), file: file, spec: spec, job: job}
}

// runOne runs a VM with one order.
func runOne(ctx context.Context, v *vm, o *order, progress func(guest.Progress)) outcome {
	o.ctx, o.progress = ctx, progress
	return v.run(ctx, []*order{o}).of(0)
}

// mustFail runs a broken VM and checks that the error for the operator contains the words.
func mustFail(t *testing.T, v *vm, o *order, words ...string) outcome {
	t.Helper()
	out := runOne(t.Context(), v, o, nil)
	err := out.judge()
	if !errors.Is(err, ErrFormat) {
		t.Fatalf("%+v is judged %v, want ErrFormat", out, err)
	}
	t.Logf("the operator reads: %v", err)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
	return out
}

func TestFailureMissingLibrary(t *testing.T) {
	v, f := broken(t, func(r kit) {
		for name := range r.files {
			if strings.HasPrefix(name, guest.LibDir+"/libext2fs") {
				delete(r.files, name)
			}
		}
	}, nil)
	o := mustFail(t, v, f, "exit code 127", "libext2fs.so.2", "reinstall its package")
	if o.exit != nil || o.events.shutdown != reasonGuestShutdown {
		t.Errorf("QEMU: %v, shutdown %q", o.exit, o.events.shutdown)
	}
}

func TestFailureMkfs(t *testing.T) {
	v, f := broken(t, func(r kit) {
		r.job.Mkfs = append(r.job.Mkfs[:1:1], "-F", "-O", "nosuchfeature", guest.DevicePlaceholder)
	}, nil)
	o := mustFail(t, v, f, "mkfs failed with exit code 1", "nosuchfeature")
	if o.exit != nil || o.events.shutdown != reasonGuestShutdown {
		t.Errorf("QEMU: %v, shutdown %q", o.exit, o.events.shutdown)
	}
}

// TestFailureMkfsWroteNothing has a mkfs that exits with 0 and writes nothing.
func TestFailureMkfsWroteNothing(t *testing.T) {
	v, f := broken(t, func(r kit) { r.job.Mkfs = []string{r.job.Mkfs[0], "-n", "-F", "-q", guest.DevicePlaceholder} }, nil)
	mustFail(t, v, f, fmt.Sprintf("exit code %d", guest.ExitUnwritten), "left no valid filesystem")
}

func TestFailureChecker(t *testing.T) {
	v, f := broken(t, func(r kit) { r.job.Check = []string{r.job.Check[0], "-fn", "/dev/nonexistent"} }, nil)
	mustFail(t, v, f, "check failed with exit code 8", "No such file")
}

func TestFailureMount(t *testing.T) {
	v, f := broken(t, func(r kit) { r.job.MountData = "nosuchoption" }, nil)
	mustFail(t, v, f, "the guest's kernel cannot mount the new ext4", "nosuchoption")
}

func TestFailureInitExits(t *testing.T) {
	v, f := broken(t, func(r kit) { r.init[guest.InitPath] = r.files["/bin/mkfs.ext4"] }, nil)
	o := mustFail(t, v, f, "crashed or its init ended early", "guest-reset", "Kernel panic")
	if o.exit != nil {
		t.Errorf("QEMU: %v, want none: it exits with 0 at a reset", o.exit)
	}
}

func TestFailureLittleMemory(t *testing.T) {
	v, f := broken(t, nil, func(v *vm) { v.memory = 64 })
	mustFail(t, v, f, "crashed", "memory too small")
}

func TestFailureKernelImages(t *testing.T) {
	for _, c := range []struct {
		name, word string
		content    func(vmlinuz, vmlinux []byte) []byte
	}{
		{"empty vmlinux", "QEMU ended with an error", func(_, _ []byte) []byte { return nil }},
		{"truncated vmlinux", "QEMU ended with an error", func(_, b []byte) []byte { return b[:len(b)/2] }},
		{"truncated bzImage", "crashed", func(b, _ []byte) []byte { return b[:len(b)/2] }},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r *recipe
			v, f := broken(t, func(k kit) { r = k.recipe }, func(v *vm) { v.timeout = 20 * time.Second })
			vmlinuz, err := os.ReadFile(r.kernel.path)
			if err != nil {
				t.Fatal(err)
			}
			vmlinux, err := os.ReadFile(v.kernel.path)
			if err != nil {
				t.Fatal(err)
			}
			v.kernel.path = filepath.Join(testenv.Dir(t), "kernel")
			if err := os.WriteFile(v.kernel.path, c.content(vmlinuz, vmlinux), 0o444); err != nil {
				t.Fatal(err)
			}
			o := mustFail(t, v, f, c.word)
			if o.noVerdict == nil {
				t.Error("there is a verdict")
			}
		})
	}
}

func TestFailureHang(t *testing.T) {
	v, f := broken(t, func(r kit) {
		if err := addProgram(r.files, "/bin/sleep", "/bin/sleep"); err != nil {
			t.Fatal(err)
		}
		r.job.Mkfs = []string{"/bin/sleep", "1000"}
	}, func(v *vm) { v.timeout = 8 * time.Second })
	o := mustFail(t, v, f, "killed at its deadline of 8s", "--format-timeout")
	if o.elapsed > 20*time.Second {
		t.Errorf("the VM ended only after %s", o.elapsed)
	}
}

func TestFailureTruncatedInitramfs(t *testing.T) {
	v, f := broken(t, nil, func(v *vm) {
		fi, err := v.initrd.Stat()
		if err == nil {
			err = v.initrd.Truncate(fi.Size() - int64(len(guest.Marker)) - 300)
		}
		if err != nil {
			t.Fatal(err)
		}
		v.timeout = 20 * time.Second
	})
	mustFail(t, v, f, "powered off without its verdict", "the initramfs is truncated")
}

func TestFailureKilled(t *testing.T) {
	v, f := broken(t, nil, nil)
	o := runOne(t.Context(), v, f, func(p guest.Progress) {
		if p.Stage == guest.StageMkfs {
			syscall.Kill(findProcess(v.nonce), syscall.SIGKILL)
		}
	})
	if err := o.judge(); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("the run is judged %v", err)
	}
}

func TestCancel(t *testing.T) {
	v, f := broken(t, nil, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := runOne(ctx, v, f, func(guest.Progress) { cancel() }).judge()
	if !errors.Is(err, context.Canceled) || !errors.Is(err, ErrFormat) {
		t.Errorf("the run is judged %v", err)
	}
	if pid := findProcess(v.nonce); pid > 0 {
		t.Errorf("QEMU %d still runs", pid)
	}
}

// TestFailurePoolFull formats where there is no space. QEMU stops, as it should, or ignores
// the failed writes, so that the guest believes that it succeeded.
func TestFailurePoolFull(t *testing.T) {
	for _, werror := range []string{"stop", "ignore"} {
		t.Run("werror="+werror, func(t *testing.T) {
			v, f := broken(t, nil, func(v *vm) { v.werror = werror })
			dir := testenv.XFS.Mount(t, 300<<20)
			f.file = image(t, dir)
			if err := f.file.Truncate(64 << 20); err != nil {
				t.Fatal(err)
			}
			testenv.Fill(t, dir)
			o := runOne(t.Context(), v, f, nil)
			err := o.judge()
			t.Logf("the verdict says OK: %v; the operator reads: %v", o.verdict.OK, err)
			if !errors.Is(err, ErrNoSpace) || !errors.Is(err, ErrFormat) {
				t.Errorf("the run is judged %v", err)
			}
		})
	}
}
