// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package disktest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestMounted mounts disks of each filesystem, several at the same time, from caches that can clone and
// that cannot. Afterwards nothing is left of them.
func TestMounted(t *testing.T) {
	for _, c := range []struct {
		kind        testenv.Kind
		filesystems []string
	}{{testenv.XFS, []string{"ext4", "xfs", "xfs"}}, {testenv.Ext4, []string{"ext4", "ext4"}}} {
		kind, made := c.kind, len(slices.Compact(slices.Clone(c.filesystems)))
		cache := filepath.Join(kind.Mount(t, 2<<30), "cache")
		t.Cleanup(func() { closeCache(t, cache) }) // before its filesystem is unmounted
		var dirs []string
		t.Run(kind.Name, func(t *testing.T) {
			for _, filesystem := range c.filesystems {
				dir := Mounted(t, Options{Filesystem: filesystem, Size: 300 << 20, Cache: cache})
				got := strings.TrimSpace(testenv.Run(t, "findmnt", "-n", "-o", "FSTYPE", "--mountpoint", dir))
				if got != filesystem {
					t.Errorf("mounted is %s, want %s", got, filesystem)
				}
				if err := os.WriteFile(filepath.Join(dir, "file"), []byte(dir), 0o600); err != nil {
					t.Error(err)
				}
				dirs = append(dirs, dir)
			}
			for _, dir := range dirs {
				if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != dir {
					t.Errorf("%s has %q: %v", dir, b, err)
				}
			}
		})
		for _, dir := range dirs {
			if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", dir, err)
			}
		}
		testenv.NoLoopsBelow(t, cache)
		if names, err := filepath.Glob(filepath.Join(cache, "templates", "*")); err != nil || len(names) != made {
			t.Errorf("the cache has the templates %q: %v", names, err)
		}
	}
}

// closeCache closes a cache, which otherwise stays open until the process ends.
func closeCache(t *testing.T, dir string) {
	mu.Lock()
	defer mu.Unlock()
	c := caches[dir]
	delete(caches, dir)
	if c == nil {
		return
	}
	c.templates.Close()
	if err := c.pool.Close(); err != nil {
		t.Error(err)
	}
}

// TestDeviceAndFile: both are the disk itself, and are gone after their test.
func TestDeviceAndFile(t *testing.T) {
	cache := filepath.Join(testenv.XFS.Pool(t), "cache")
	t.Cleanup(func() { closeCache(t, cache) })
	var device, file string
	t.Run("disks", func(t *testing.T) {
		device = Device(t, Options{Size: 64 << 20, Cache: cache})
		file = File(t, Options{Size: 64<<20 - 1, Cache: cache}) // rounded up
		uuids := map[string]bool{}
		for _, path := range []string{device, file} {
			testenv.Run(t, "e2fsck", "-fn", path)
			uuids[testenv.Run(t, "blkid", "-p", "-s", "UUID", "-o", "value", path)] = true
		}
		if len(uuids) != 2 {
			t.Errorf("they have the UUIDs %v", uuids)
		}
		raw := Device(t, Options{Filesystem: "raw", Size: 64 << 20, Cache: cache})
		testenv.Run(t, "mkfs.ext4", "-q", raw)
	})
	testenv.NoLoopsBelow(t, cache)
	if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", file, err)
	}
	if out, err := testenv.Try("losetup", device); err == nil && strings.Contains(out, cache) {
		t.Errorf("%s is left: %s", device, out)
	}
}

// failures are tests that must fail. TestFailures runs them in a process of their own.
var failures = map[string]struct {
	test func(*testing.T)
	user uint32
	says string
}{
	"not root":   {func(t *testing.T) { Mounted(t, Options{}) }, 65534, "run the test as root, or use disktest.File"},
	"filesystem": {func(t *testing.T) { File(t, Options{Filesystem: "ntfs"}) }, 65534, "Options.Filesystem: "},
	"size":       {func(t *testing.T) { File(t, Options{Size: 1}) }, 65534, "Options: "},
	"raw":        {func(t *testing.T) { Mounted(t, Options{Filesystem: "raw"}) }, 0, "cannot be mounted; use disktest.Device"},
	"no cache":   {func(t *testing.T) { File(t, Options{}) }, 65534, "set Options.Cache"},
	"cache of others": {func(t *testing.T) {
		File(t, Options{Cache: "/var/lib/csi-disktemplate-nowhere"})
	}, 65534, "permission denied"},
	"left busy": {func(t *testing.T) {
		dir := Mounted(t, Options{Size: 64 << 20})
		t.Log("mounted at", dir)
		var err error
		if left, err = os.Create(filepath.Join(dir, "open")); err != nil {
			t.Fatal(err)
		}
	}, 0, "fuser -vm"},
}

// left is a file that a test has not closed. The garbage collector does not close it.
var left *os.File

const failing = "CSI_DISKTEMPLATE_TEST_FAILING"

func TestFailures(t *testing.T) {
	if name := os.Getenv(failing); name != "" {
		failures[name].test(t)
		return
	}
	binary := filepath.Join(testenv.Dir(t), "test") // other users may have no access to that of go test
	testenv.Run(t, "cp", os.Args[0], binary)
	if err := os.Chmod(filepath.Dir(binary), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, c := range failures {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), binary, "-test.run", "^TestFailures$", "-test.v")
			cmd.Dir = "/"
			cmd.Env = []string{failing + "=" + name, "PATH=" + os.Getenv("PATH"), "TMPDIR=/tmp"}
			if c.user == 0 {
				cmd.Env = append(cmd.Env, "XDG_CACHE_HOME="+testenv.Dir(t))
			}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.user, Gid: c.user}}
			code, out := testenv.Finish(t, cmd)
			if code != 1 || !strings.Contains(out, "--- FAIL: ") || !strings.Contains(out, c.says) {
				t.Errorf("exit code %d, want %q", code, c.says)
			}
			m := regexp.MustCompile(`mounted at (\S+)`).FindStringSubmatch(out)
			if m != nil && testenv.Mounts(t, filepath.Dir(m[1])) > 0 {
				t.Errorf("%s is mounted", m[1])
			}
		})
	}
}

// TestDocumented runs the test of the package comment in a module of its own, as another project would.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(doc), "//\tpackage shop\n")
	example, _, _ = strings.Cut(example, "//\n// The first disk")
	example = "package shop\n" + regexp.MustCompile(`(?m)^//\t?`).ReplaceAllString(example, "")
	root := strings.TrimSpace(testenv.Run(t, "go", "list", "-m", "-f", "{{.Dir}}"))
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/csi-disktemplate/csi-disktemplate"
	text := strings.Replace(string(mod), "module "+module, "module example.com/shop", 1)
	text += fmt.Sprintf("\nrequire %s v0.0.0\n\nreplace %[1]s => %s\n", module, root)
	dir := testenv.Dir(t)
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "go.mod"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(dir, "shop_test.go"), []byte(example), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "cp", filepath.Join(root, "go.sum"), dir)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-mod=mod", "-v", ".")
	cmd.Dir = dir
	goCache := strings.TrimSpace(testenv.Run(t, "go", "env", "GOCACHE")) // which XDG_CACHE_HOME would move
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+filepath.Join(dir, "cache"), "GOCACHE="+goCache)
	if code, out := testenv.Finish(t, cmd); code != 0 || !strings.Contains(out, "--- PASS: TestFullDisk") {
		t.Errorf("exit code %d of\n%s", code, example)
	}
}
