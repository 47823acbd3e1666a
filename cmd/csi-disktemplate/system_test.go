// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/kvm"
)

// fails runs the product. It must end with exit code 1 and print the given words.
func fails(t *testing.T, args []string, says ...string) {
	t.Helper()
	code, out := testenv.Product(t, args...)
	if code != 1 {
		t.Errorf("exit code %d, not 1", code)
	}
	for _, s := range says {
		if !strings.Contains(out, s) {
			t.Errorf("does not say %s", s)
		}
	}
	if strings.Contains(out, "panic:") || strings.Contains(out, "goroutine ") {
		t.Error("crashed")
	}
}

// names lists a directory.
func names(t *testing.T, dir string) (found []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found
}

// TestBadFlags starts the plugin with flags that cannot work. It must say what to do, and
// must not make anything.
func TestBadFlags(t *testing.T) {
	t.Setenv("NODE_NAME", "")
	t.Setenv("CSI_ENDPOINT", "")
	fs := testenv.XFS.Mount(t, 512<<20)
	kubelet := testenv.Dir(t)
	good := map[string]string{"--pool": filepath.Join(fs, "pool"), "--node-id": "node1", "--kubelet-dir": kubelet, "--endpoint": "unix://" + filepath.Join(kubelet, "csi.sock")}
	for name, c := range map[string]struct {
		with map[string]string
		says []string
	}{
		"no pool":                   {map[string]string{"--pool": ""}, []string{"--pool", "btrfs", "xfs"}},
		"no node":                   {map[string]string{"--node-id": ""}, []string{"--node-id", "NODE_NAME"}},
		"no driver name":            {map[string]string{"--driver-name": ""}, []string{"--driver-name", "63"}},
		"accelerator":               {map[string]string{"--accel": "warp"}, []string{"--accel", `"warp"`, "auto, kvm, tcg"}},
		"format timeout":            {map[string]string{"--format-timeout": "0s"}, []string{"--format-timeout", "0s", "more than 0"}},
		"format timeout in words":   {map[string]string{"--format-timeout": "soon"}, []string{"--format-timeout", `"soon"`}},
		"endpoint":                  {map[string]string{"--endpoint": "tcp://0.0.0.0:1"}, []string{"--endpoint", "tcp://0.0.0.0:1", "unix:///csi/csi.sock"}},
		"HTTP endpoint, no port":    {map[string]string{"--http-endpoint": "127.0.0.1"}, []string{"--http-endpoint", `"127.0.0.1"`, ":9808"}},
		"loopback size in words":    {map[string]string{"--loopback-pool-size": "big"}, []string{"--loopback-pool-size", `"big"`, "10Gi"}},
		"loopback size zero":        {map[string]string{"--loopback-pool-size": "0"}, []string{"--loopback-pool-size", `"0"`, "more than 0"}},
		"loopback size negative":    {map[string]string{"--loopback-pool-size": "-20Gi"}, []string{"--loopback-pool-size", `"-20Gi"`, "more than 0"}},
		"sweep interval":            {map[string]string{"--sweep-interval": "-1s"}, []string{"--sweep-interval", "-1s", "negative"}},
		"overcommit":                {map[string]string{"--overcommit": "0.5"}, []string{"--overcommit", "0.5", "at least 1"}},
		"overcommit, no number":     {map[string]string{"--overcommit": "NaN"}, []string{"--overcommit", "NaN", "at least 1"}},
		"headroom":                  {map[string]string{"--headroom": "110%"}, []string{"--headroom", `"110%"`, "100%"}},
		"headroom in words":         {map[string]string{"--headroom": "some"}, []string{"--headroom", `"some"`, "10Gi"}},
		"max volumes":               {map[string]string{"--max-volumes-per-node": "-1"}, []string{"--max-volumes-per-node", "-1", "negative"}},
		"builds per hour":           {map[string]string{"--max-template-builds-per-hour": "-1"}, []string{`--max-template-builds-per-hour "-1"`, "negative"}},
		"template cache":            {map[string]string{"--template-cache": "100%"}, []string{"--template-cache", `"100%"`, "100%"}},
		"template cache in words":   {map[string]string{"--template-cache": "some"}, []string{"--template-cache", `"some"`, "10Gi"}},
		"template cache negative":   {map[string]string{"--template-cache": "-1Gi"}, []string{"--template-cache", `"-1Gi"`, "negative"}},
		"inline size":               {map[string]string{"--max-inline-size": "-1Gi"}, []string{"--max-inline-size", `"-1Gi"`, "negative"}},
		"inline size in words":      {map[string]string{"--max-inline-size": "big"}, []string{"--max-inline-size", `"big"`, "10Gi"}},
		"inline volumes":            {map[string]string{"--max-inline-volumes": "-1"}, []string{`--max-inline-volumes "-1"`, "negative"}},
		"inline volumes of one":     {map[string]string{"--max-inline-volumes-per-namespace": "-1"}, []string{`--max-inline-volumes-per-namespace "-1"`, "negative"}},
		"inline bytes":              {map[string]string{"--max-inline-bytes": "-1"}, []string{"--max-inline-bytes", `"-1"`, "negative"}},
		"inline bytes of one":       {map[string]string{"--max-inline-bytes-per-namespace": "1TB"}, []string{"--max-inline-bytes-per-namespace", `"1TB"`, "10Gi"}},
		"unknown flag":              {map[string]string{"--pol": "x"}, []string{"--pol"}},
		"unknown word":              {map[string]string{"fromat": ""}, []string{"fromat"}},
		"no kubelet directory":      {map[string]string{"--kubelet-dir": "/nonexistent/kubelet"}, []string{`--kubelet-dir "/nonexistent/kubelet"`, "mkdir -p /nonexistent/kubelet"}},
		"kubelet directory, a file": {map[string]string{"--kubelet-dir": "/etc/passwd/x"}, []string{`--kubelet-dir "/etc/passwd/x"`, "not a directory"}},
		"pool below a file":         {map[string]string{"--pool": "/etc/passwd/pool"}, []string{"/etc/passwd"}},
		"two things that are wrong": {map[string]string{"--node-id": "", "--accel": "warp"}, []string{"--node-id", "--accel"}},
	} {
		t.Run(name, func(t *testing.T) {
			var args []string
			for flag, value := range good {
				if _, given := c.with[flag]; !given {
					args = append(args, flag, value)
				}
			}
			for flag, value := range c.with {
				args = append(args, flag)
				if strings.HasPrefix(flag, "--") {
					args = append(args, value)
				}
			}
			fails(t, args, c.says...)
			if made := append(names(t, fs), names(t, kubelet)...); len(made) > 0 {
				t.Errorf("made %v", made)
			}
		})
	}

	// The plugin refuses these only after it opened the pool, which is good and stays.
	for name, c := range map[string]struct{ flag, value, says string }{
		"no place for the socket":     {"--endpoint", "unix:///etc/passwd/csi.sock", "the socket's directory cannot be made"},
		"HTTP endpoint of others":     {"--http-endpoint", "192.0.2.1:9808", "--http-endpoint"},
		"page endpoint of others":     {"--page-endpoint", "192.0.2.1:9809", "--page-endpoint"},
		"a file at the socket's path": {"--endpoint", "unix:///etc/passwd", "not a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{c.flag, c.value, "--accel", "tcg"}
			for flag, value := range good {
				if flag != c.flag {
					args = append(args, flag, value)
				}
			}
			fails(t, args, c.says, c.value)
			if made := names(t, kubelet); len(made) > 0 {
				t.Errorf("made %v", made)
			}
		})
	}
}

// TestBadPools starts the plugin where no pool can be.
func TestBadPools(t *testing.T) {
	kubelet := testenv.Dir(t)
	ext4, tmpfs, noReflink := testenv.Ext4.Mount(t, 512<<20), testenv.Tmpfs(t), testenv.XFSNoReflink.Mount(t, 512<<20)
	xfs := testenv.XFS.Mount(t, 512<<20)
	if err := errors.Join(
		os.WriteFile(filepath.Join(xfs, "file"), nil, 0o600),
		os.Mkdir(filepath.Join(xfs, "open"), 0o700), os.Chmod(filepath.Join(xfs, "open"), 0o777),
	); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		pool string
		more []string
		says []string
	}{
		"ext4":                 {pool: filepath.Join(ext4, "pool"), says: []string{"ext4", "btrfs", "xfs", "--loopback-pool-size"}},
		"ext4, file too small": {pool: filepath.Join(ext4, "small"), more: []string{"--loopback-pool-size", "10Mi"}, says: []string{"--loopback-pool-size", "300Mi"}},
		"ext4, file too large": {pool: filepath.Join(ext4, "large"), more: []string{"--loopback-pool-size", "1e30"}, says: []string{"--loopback-pool-size", "too large"}},
		"tmpfs":                {pool: filepath.Join(tmpfs, "pool"), says: []string{"tmpfs", "btrfs", "xfs", "--loopback-pool-size"}},
		"xfs without reflink":  {pool: filepath.Join(noReflink, "pool"), says: []string{"reflink=1"}},
		"a file":               {pool: filepath.Join(xfs, "file"), says: []string{"not a directory"}},
		"open to others":       {pool: filepath.Join(xfs, "open"), says: []string{"0777", "chmod 0700"}},
	} {
		t.Run(name, func(t *testing.T) {
			args := append(c.more, "--pool", c.pool, "--node-id", "node1", "--kubelet-dir", kubelet, "--endpoint", "unix://"+filepath.Join(kubelet, "csi.sock"))
			fails(t, args, append(c.says, c.pool)...)
		})
	}
	for _, path := range []string{
		filepath.Join(ext4, "pool"), filepath.Join(tmpfs, "pool"),
		filepath.Join(ext4, "small", "pool.img"), filepath.Join(ext4, "large", "pool.img"),
	} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was made: %v", path, err)
		}
	}
}

func TestFormatCommand(t *testing.T) {
	for name, c := range map[string]struct {
		args  []string
		size  int64
		check []string
		says  []string
	}{
		"ext4": {
			[]string{"--size", "64Mi", "--label", "data"}, 64 << 20, []string{"e2fsck", "-fn"},
			[]string{"ext4 64Mi label=data", "UUID ", "mke2fs", "Linux ", "under tcg"},
		},
		"xfs": {
			[]string{"--fs", "xfs", "--size", "320M", "--option", "inode-size=1024", "--option", "rmapbt=1"}, 306 << 20, []string{"xfs_repair", "-n", "-f"},
			[]string{"xfs 306Mi inode-size=1024 rmapbt=1", "UUID ", "mkfs.xfs", "Linux ", "under tcg"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := testenv.Dir(t)
			image := filepath.Join(dir, "disk.img")
			code, out := testenv.Product(t, append([]string{"format", "--accel", "tcg", "-o", image}, c.args...)...)
			if code != 0 {
				t.Fatalf("exit code %d", code)
			}
			for _, s := range append(c.says, "boot ", "mkfs ", "check ", image) {
				if !strings.Contains(out, s) {
					t.Errorf("does not say %s", s)
				}
			}
			if strings.ContainsAny(out, "\r\x1b") {
				t.Errorf("control characters in output that is not for a terminal: %q", out)
			}
			fi, err := os.Stat(image)
			if err != nil || fi.Size() != c.size || fi.Mode() != 0o644 {
				t.Fatalf("%v: %v", fi, err)
			}
			testenv.Run(t, c.check[0], append(c.check[1:], image)...)
			if got := names(t, dir); !slices.Equal(got, []string{"disk.img"}) {
				t.Errorf("made %v", got)
			}
		})
	}
}

// TestFormatNeedsNoRoot formats as a user without privileges.
func TestFormatNeedsNoRoot(t *testing.T) {
	const nobody = 65534
	dir := testenv.Dir(t)
	binary := filepath.Join(dir, "csi-disktemplate") // other users may have no access to the checkout
	testenv.Run(t, "cp", testenv.Binary(t), binary)
	home := filepath.Join(dir, "home")
	if err := errors.Join(os.Mkdir(home, 0o700), os.Chown(home, nobody, nobody), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(home, "disk.img")
	cmd := exec.CommandContext(t.Context(), binary, "format", "--accel", "tcg", "--size", "64Mi", "-o", image)
	cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
	cmd.Dir = home
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	if code, _ := testenv.Finish(t, cmd); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	testenv.Run(t, "e2fsck", "-fn", image)
}

// TestFormatWithoutHome formats as a container of a CI system does: as a random user, whose home
// is missing, or is not to be written to.
func TestFormatWithoutHome(t *testing.T) {
	const random = 1000700000
	dir := testenv.Dir(t)
	binary := filepath.Join(dir, "csi-disktemplate")
	testenv.Run(t, "cp", testenv.Binary(t), binary)
	work, sealed, readonly := filepath.Join(dir, "work"), filepath.Join(dir, "sealed"), testenv.Tmpfs(t)
	if err := errors.Join(
		os.Chmod(dir, 0o755), os.Chmod(readonly, 0o777), os.Mkdir(sealed, 0o755), os.Mkdir(work, 0o700), os.Chown(work, random, random),
		syscall.Mount("", readonly, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""),
	); err != nil {
		t.Fatal(err)
	}
	for name, env := range map[string][]string{
		"HOME unset":                   nil,
		"HOME=/":                       {"HOME=/"},
		"HOME of somebody else":        {"HOME=" + sealed},
		"HOME read-only":               {"HOME=" + readonly},
		"HOME missing":                 {"HOME=/nonexistent/home"},
		"a cache directory, read-only": {"HOME=" + work, "XDG_CACHE_HOME=" + readonly},
	} {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(work, "disk.img")
			defer os.Remove(image)
			cmd := exec.CommandContext(t.Context(), binary, "format", "--size", "64Mi", "-o", image)
			cmd.Env = append(env, "PATH=/usr/bin:/bin")
			cmd.Dir = work
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: random, Gid: random}}
			code, out := testenv.Finish(t, cmd)
			if code != 0 {
				t.Fatalf("exit code %d", code)
			}
			if kvm.Usable() != nil && !strings.Contains(out, "accelerator tcg, which is slower than kvm: KVM is not usable: ") {
				t.Error("does not say why it emulates")
			}
			testenv.Run(t, "e2fsck", "-fn", image)
			if got := names(t, work); !slices.Equal(got, []string{"disk.img"}) {
				t.Errorf("made %v", got)
			}
		})
	}
}

// terminal opens a pseudoterminal: pty(7), TIOCSPTLCK and TIOCGPTN in ioctl_tty(2).
func terminal(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	for _, request := range []uintptr{syscall.TIOCSPTLCK, syscall.TIOCGPTN} {
		var n int32
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, ours.Fd(), request, uintptr(unsafe.Pointer(&n))); errno != 0 {
			t.Fatal(errno)
		}
		if request == syscall.TIOCGPTN {
			theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// TestFormatOnTerminal checks which terminals get control characters.
func TestFormatOnTerminal(t *testing.T) {
	for kind, controls := range map[string]bool{"TERM=xterm": true, "TERM=dumb": false, "TERM=": false} {
		t.Run(kind, func(t *testing.T) {
			ours, theirs := terminal(t)
			cmd := exec.CommandContext(t.Context(), testenv.Binary(t), "format", "--accel", "tcg", "--size", "64Mi", "-o", filepath.Join(testenv.Dir(t), "disk.img"))
			cmd.Env = append(os.Environ(), kind)
			cmd.Stderr = theirs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			out, _ := io.ReadAll(ours) // the end of the last writer is EIO
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			// The terminal itself makes \r\n of \n.
			text := strings.ReplaceAll(string(out), "\r\n", "\n")
			if !strings.Contains(text, "mkfs ") || strings.ContainsAny(text, "\r\x1b") != controls {
				t.Errorf("control characters %v: %q", !controls, text)
			}
		})
	}
}

// TestFormatRaw makes a raw image without QEMU and without a kernel: it needs no VM.
func TestFormatRaw(t *testing.T) {
	image := filepath.Join(testenv.Dir(t), "disk.img")
	code, out := testenv.Product(t, "format", "--fs", "raw", "--size", "3Gi", "--qemu", "/nonexistent", "--kernel", "/nonexistent", "-o", image)
	if code != 0 || !strings.Contains(out, "raw 3Gi") {
		t.Fatalf("exit code %d", code)
	}
	fi, err := os.Stat(image)
	if err != nil || fi.Size() != 3<<30 {
		t.Fatalf("%v: %v", fi, err)
	}
	if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used != 0 {
		t.Errorf("%d bytes are allocated", used)
	}
}

// TestFormatFails checks that a failed run leaves no file, and that it does not change the
// files that existed before.
func TestFormatFails(t *testing.T) {
	dir := testenv.Dir(t)
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "old.img"), []byte("precious"), 0o600),
		os.Symlink("nowhere", filepath.Join(dir, "dangling.img")),
		os.Mkdir(filepath.Join(dir, "dir.img"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	before := names(t, dir)
	check := func(t *testing.T) {
		t.Helper()
		if after := names(t, dir); !slices.Equal(before, after) {
			t.Errorf("there was %v, there is %v", before, after)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "old.img")); err != nil || string(b) != "precious" {
			t.Errorf("the old file has %q: %v", b, err)
		}
	}
	new := filepath.Join(dir, "new.img")
	small := testenv.Ext4.Mount(t, 64<<20) // its largest file has 16 TiB
	large, full := filepath.Join(small, "new.img"), testenv.Ext4.Mount(t, 64<<20)
	testenv.Fill(t, full)
	cases := map[string]struct{ args, says []string }{
		"existing file":        {[]string{"-o", filepath.Join(dir, "old.img")}, []string{"--output", "old.img", "exists"}},
		"dangling link":        {[]string{"-o", filepath.Join(dir, "dangling.img")}, []string{"--output", "dangling.img", "exists"}},
		"existing directory":   {[]string{"-o", filepath.Join(dir, "dir.img")}, []string{"--output", "dir.img", "exists"}},
		"missing directory":    {[]string{"-o", filepath.Join(dir, "missing", "new.img")}, []string{"--output", "missing"}},
		"existing file of raw": {[]string{"--fs", "raw", "-o", filepath.Join(dir, "old.img")}, []string{"--output", "exists"}},
		"too large a file":     {[]string{"--fs", "xfs", "--size", "4294967295Mi", "-o", large}, []string{`--size "4294967295Mi": the filesystem of `, "btrfs or xfs"}},
		"too large a raw file": {[]string{"--fs", "raw", "--size", "17Ti", "-o", large}, []string{`--size "17Ti": the filesystem of `, "btrfs or xfs"}},
		"no space":             {[]string{"--fs", "btrfs", "--size", "1Gi", "--accel", "tcg", "-o", filepath.Join(full, "new.img")}, []string{"no space left for the image", "free space on its filesystem"}},
		"standard output":      {[]string{"-o", "-"}, []string{`--output "-"`, "standard output", "./-"}},
		"no QEMU":              {[]string{"--qemu", "/nonexistent/qemu"}, []string{"--qemu", "/nonexistent/qemu", "qemu-system-x86"}},
		"no kernel":            {[]string{"--kernel", "/nonexistent/vmlinuz"}, []string{"--kernel", "/nonexistent/vmlinuz"}},
		"not a kernel":         {[]string{"--kernel", "/etc/passwd"}, []string{"/etc/passwd", "vmlinuz or vmlinux"}},
		"QEMU that fails":      {[]string{"--qemu", "/bin/false", "--accel", "tcg"}, []string{"QEMU ended with an error"}},
		"too little time":      {[]string{"--format-timeout", "300ms", "--accel", "tcg"}, []string{"300ms", "--format-timeout", "boot", "failed"}},
	}
	for name, c := range badSpecs {
		cases["bad "+name] = struct{ args, says []string }{c.args, c.says}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			fails(t, append([]string{"format", "-o", new}, c.args...), c.says...)
			check(t)
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		var out bytes.Buffer
		cmd := exec.CommandContext(t.Context(), testenv.Binary(t), "format", "--accel", "tcg", "-o", new)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The process has a child once QEMU runs.
		testenv.Eventually(t, "a VM", func() bool {
			lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
			return slices.ContainsFunc(lists, func(list string) bool {
				b, _ := os.ReadFile(list)
				return len(b) > 0
			})
		})
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		cmd.Wait() // its error says no more than ProcessState
		t.Logf("%s\n%s", cmd.ProcessState, &out)
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out.String(), "canceled") {
			t.Errorf("ended with %s", cmd.ProcessState)
		}
		if strings.Contains(out.String(), "last lines") {
			t.Errorf("shows what the VM printed")
		}
		check(t)
	})
}
