// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
)

// bootDir is where distributions install kernels.
var bootDir = "/boot"

// kernel is the one the VM boots.
type kernel struct {
	path    string // vmlinuz or vmlinux
	version string // uname -r
	modules string // its module directory

	// From readKernel only.
	image  []byte // content of path
	digest string // SHA-256 of image
	form   kernelForm
}

// findKernel returns the configured kernel, or the newest one that is installed together
// with its modules.
func (f *Formatter) findKernel(m machine) (kernel, error) {
	if f.cfg.Kernel != "" {
		if fi, err := os.Stat(f.cfg.Kernel); err != nil {
			return kernel{}, missing("give a vmlinuz or vmlinux", "--kernel: %w", err)
		} else if !fi.Mode().IsRegular() {
			return kernel{}, missing("give a vmlinuz or vmlinux", "--kernel %s: it is not a regular file", f.cfg.Kernel)
		}
		return kernel{path: f.cfg.Kernel, modules: f.cfg.Modules}, nil
	}
	images, _ := filepath.Glob(filepath.Join(bootDir, "vmlinuz-*"))
	slices.SortFunc(images, func(a, b string) int { return compareVersions(b, a) })
	for _, image := range images {
		version := strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		modules := filepath.Join("/lib/modules", version)
		if _, err := os.Stat(filepath.Join(modules, "modules.dep")); err == nil {
			return kernel{path: image, modules: modules}, nil
		}
	}
	return kernel{}, missing("install the package "+m.kernelPackage+" or give --kernel",
		"no kernel %s/vmlinuz-* has its modules in /lib/modules", bootDir)
}

// compareVersions orders as `sort -V` does: it compares runs of digits by value.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		da, db := digits(a), digits(b)
		if da > 0 && db > 0 {
			na, nb := strings.TrimLeft(a[:da], "0"), strings.TrimLeft(b[:db], "0")
			if c := len(na) - len(nb); c != 0 {
				return c
			}
			if c := strings.Compare(na, nb); c != 0 {
				return c
			}
			a, b = a[da:], b[db:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// readKernel finds the kernel and reads it.
func (f *Formatter) readKernel(m machine) (kernel, error) {
	k, err := f.findKernel(m)
	if err != nil {
		return kernel{}, err
	}
	if k.image, err = os.ReadFile(k.path); err != nil {
		return kernel{}, missing("give another --kernel", "%w", err)
	}
	k.form = m.kernel
	sum := sha256.Sum256(k.image)
	k.digest = hex.EncodeToString(sum[:])
	if k.version, err = k.form.version(k.image); err != nil {
		return kernel{}, missing("give a vmlinuz or vmlinux", "%s: %w", k.path, err)
	}
	if k.modules == "" {
		k.modules = filepath.Join("/lib/modules", k.version)
	}
	return k, nil
}

// bootable is a kernel as QEMU boots it: a file of this machine, or the content alone.
type bootable struct {
	path    string // "" if it is in no file
	content []byte // only without a path
}

// unpacked returns the kernel that QEMU boots. It is unpacked once and kept in dir, under a
// name with the digests of both images, so that a damaged one is never used.
//
// Keeping it only saves time. A container of a CI system often runs as a user who may write
// nowhere, or on a filesystem that is read-only, full, or has no unnamed files. There, and
// with dir "", the kernel is unpacked in memory each time.
func (k kernel) unpacked(dir string) (bootable, error) {
	if k.form.ready(k.image) {
		return bootable{path: k.path}, nil
	}
	if dir == "" {
		code, err := k.unpack()
		return bootable{content: code}, err
	}
	prefix := filepath.Join(dir, "vmlinux-"+k.digest[:16]+"-")
	kept, _ := os.ReadDir(dir) // if it is unreadable, nothing is kept there
	for _, entry := range kept {
		name := filepath.Join(dir, entry.Name())
		if !strings.HasPrefix(name, prefix) {
			continue
		}
		if b, err := os.ReadFile(name); err == nil && name == prefix+shortDigest(b) {
			return bootable{path: name}, nil
		}
		os.Remove(name)
	}
	code, err := k.unpack()
	if err != nil {
		return bootable{}, err
	}
	name := prefix + shortDigest(code)
	if keep(name, code) != nil {
		return bootable{content: code}, nil
	}
	return bootable{path: name}, nil
}

func (k kernel) unpack() ([]byte, error) {
	code, err := k.form.unpack(k.image)
	if err != nil {
		return nil, missing("reinstall it or give another --kernel", "unpacking %s: %w", k.path, err)
	}
	return code, nil
}

// keep makes a file with this content. A file of that name is left alone: two formats may
// unpack the same kernel at once.
func keep(name string, content []byte) error {
	dir := filepath.Dir(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := tmpfile.Create(dir, 0o444)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	// Another user's QEMU reads the file, whatever umask root has.
	if err := errors.Join(f.Chmod(0o444), f.Sync()); err != nil {
		return err
	}
	if err := tmpfile.Link(f, name); !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

func shortDigest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// module is an unpacked kernel module.
type module struct {
	name    string
	content []byte
}

// load returns the named modules and all they depend on, dependencies first. It leaves out
// modules that the kernel has built in.
func (k kernel) load(names []string) ([]module, error) {
	hint := fmt.Sprintf("install the modules of kernel %s or give another --kernel", k.version)
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return nil, missing(hint, "%w", err)
	}
	dep, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return nil, missing(hint, "%w", err)
	}
	paths, err := resolveModules(names, string(builtin), string(dep))
	if err != nil {
		return nil, missing(hint, "kernel %s: %w", k.version, err)
	}
	var modules []module
	for _, p := range paths {
		content, err := readModule(filepath.Join(k.modules, p))
		if err != nil {
			return nil, missing(hint, "%w", err)
		}
		modules = append(modules, module{name: moduleName(p), content: content})
	}
	return modules, nil
}

// resolveModules returns the modules' paths in the order of loading, from the content of
// modules.builtin and modules.dep; see depmod(8). A line of modules.dep is
// "path: dep dep …", and is loaded from right to left.
func resolveModules(names []string, builtin, dep string) ([]string, error) {
	in := map[string]bool{}
	for line := range strings.Lines(builtin) {
		in[moduleName(strings.TrimSpace(line))] = true
	}
	needs := map[string][]string{}
	for line := range strings.Lines(dep) {
		p, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			needs[moduleName(p)] = append([]string{p}, strings.Fields(deps)...)
		}
	}
	var order []string
	for _, name := range names {
		if in[name] {
			continue
		}
		chain := needs[name]
		if chain == nil {
			return nil, fmt.Errorf("it has no module %s, neither built in nor loadable", name)
		}
		for _, p := range slices.Backward(chain) {
			if !slices.Contains(order, p) {
				order = append(order, p)
			}
		}
	}
	return order, nil
}

// moduleName maps ".../virtio-rng.ko.xz" to "virtio_rng", as the kernel calls it.
func moduleName(p string) string {
	name, _, _ := strings.Cut(filepath.Base(p), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModule reads a module and decompresses it. Distributions compress modules in
// different ways, and the guest's loader takes none of them.
func readModule(name string) ([]byte, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	switch filepath.Ext(name) {
	case ".ko":
		return b, nil
	case ".xz":
		r, err = xz.NewReader(bytes.NewReader(b), 0)
	case ".gz":
		r, err = gzip.NewReader(bytes.NewReader(b))
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(b)); err == nil {
			defer z.Close()
			r = z
		}
	default:
		return nil, fmt.Errorf("%s: its compression is unknown: .ko, .ko.xz, .ko.gz and .ko.zst can be read", name)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if b, err = io.ReadAll(r); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}
