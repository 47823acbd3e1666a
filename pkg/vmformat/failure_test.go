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

// broken prepares a VM that makes an ext4 of 64 MiB, and lets a test break it.
func broken(t *testing.T, tamper func(*recipe), damage func(*vm)) (*vm, *os.File) {
	t.Helper()
	testenv.Root(t)
	f := newFormatter(t, nil)
	spec := diskfs.Spec{Filesystem: "ext4", Size: 64 << 20}
	r, err := f.gather(spec)
	if err != nil {
		t.Fatal(err)
	}
	if tamper != nil {
		tamper(r)
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
	return v, file
}

// mustFail runs a broken VM and checks that the error for the operator contains the words.
func mustFail(t *testing.T, v *vm, file *os.File, words ...string) outcome {
	t.Helper()
	o := v.run(t.Context(), file, func(guest.Stage) {})
	err := o.judge()
	if !errors.Is(err, ErrFormat) {
		t.Fatalf("%+v is judged %v, want ErrFormat", o, err)
	}
	t.Logf("the operator reads: %v", err)
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the message lacks %q", w)
		}
	}
	return o
}

func TestFailureMissingLibrary(t *testing.T) {
	v, f := broken(t, func(r *recipe) {
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
	v, f := broken(t, func(r *recipe) {
		r.job.Mkfs = append(r.job.Mkfs[:1:1], "-F", "-O", "nosuchfeature", guest.DevicePlaceholder)
	}, nil)
	o := mustFail(t, v, f, "mkfs failed with exit code 1", "nosuchfeature")
	if o.exit != nil || o.events.shutdown != reasonGuestShutdown {
		t.Errorf("QEMU: %v, shutdown %q", o.exit, o.events.shutdown)
	}
}

// TestFailureMkfsWroteNothing has a mkfs that exits with 0 and writes nothing.
func TestFailureMkfsWroteNothing(t *testing.T) {
	v, f := broken(t, func(r *recipe) { r.job.Mkfs = []string{r.job.Mkfs[0], "-n", "-F", "-q", guest.DevicePlaceholder} }, nil)
	mustFail(t, v, f, fmt.Sprintf("exit code %d", guest.ExitUnwritten), "left no valid filesystem")
}

func TestFailureChecker(t *testing.T) {
	v, f := broken(t, func(r *recipe) { r.job.Check = []string{r.job.Check[0], "-fn", "/dev/nonexistent"} }, nil)
	mustFail(t, v, f, "check failed with exit code 8", "No such file")
}

func TestFailureMount(t *testing.T) {
	v, f := broken(t, func(r *recipe) { r.job.MountData = "nosuchoption" }, nil)
	mustFail(t, v, f, "the guest's kernel cannot mount the new ext4", "nosuchoption")
}

func TestFailureInitExits(t *testing.T) {
	v, f := broken(t, func(r *recipe) { r.init[guest.InitPath] = r.files["/bin/mkfs.ext4"] }, nil)
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
			v, f := broken(t, func(rr *recipe) { r = rr }, func(v *vm) { v.timeout = 20 * time.Second })
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
	v, f := broken(t, func(r *recipe) {
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
	o := v.run(t.Context(), f, func(stage guest.Stage) {
		if stage == guest.StageMkfs {
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
	err := v.run(ctx, f, func(guest.Stage) { cancel() }).judge()
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
			v, _ := broken(t, nil, func(v *vm) { v.werror = werror })
			dir := testenv.XFS.Mount(t, 300<<20)
			f := image(t, dir)
			if err := f.Truncate(64 << 20); err != nil {
				t.Fatal(err)
			}
			testenv.Fill(t, dir)
			o := v.run(t.Context(), f, func(guest.Stage) {})
			err := o.judge()
			t.Logf("the verdict says OK: %v; the operator reads: %v", o.verdict.OK, err)
			if !errors.Is(err, ErrNoSpace) || !errors.Is(err, ErrFormat) {
				t.Errorf("the run is judged %v", err)
			}
		})
	}
}
