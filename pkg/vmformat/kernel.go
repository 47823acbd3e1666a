// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/memfile"
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
	digest string // SHA-256 of its content
	ready  bool   // QEMU boots it as it is
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
	image, err := os.Open(k.path)
	if err != nil {
		return kernel{}, missing("give another --kernel", "%w", err)
	}
	defer image.Close()
	var size int64
	if k.digest, size, err = digest(image); err != nil {
		return kernel{}, missing("give another --kernel", "%w", err)
	}
	k.form = m.kernel
	k.ready = k.form.ready(image)
	if k.version, err = k.form.version(io.NewSectionReader(image, 0, size)); err != nil {
		return kernel{}, missing("give a vmlinuz or vmlinux", "%s: %w", k.path, err)
	}
	if k.modules == "" {
		k.modules = filepath.Join("/lib/modules", k.version)
	}
	return k, nil
}

// digest returns the SHA-256 of what is left to read, in hex, and its length in bytes.
func digest(r io.Reader) (string, int64, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// bootable is a kernel as QEMU boots it: a file of this machine, or one in memory.
type bootable struct {
	path   string   // "" if it is in memory
	memory *os.File // only without a path: a memfile, whose offset is 0
}

// unpacked returns the kernel that QEMU boots. It is unpacked once and kept in dir, under a
// name with the digests of both images, so that a damaged one is never used.
//
// Keeping it only saves time. A container of a CI system often runs as a user who may write
// nowhere, or on a filesystem that is read-only, full, or has no unnamed files. There, and
// with dir "", the kernel is unpacked in memory each time.
func (k kernel) unpacked(dir string) (bootable, error) {
	if k.ready {
		return bootable{path: k.path}, nil
	}
	if dir != "" {
		if name := k.kept(dir); name != "" {
			return bootable{path: name}, nil
		}
		if name, err := k.keep(dir); err == nil {
			return bootable{path: name}, nil
		}
	}
	return k.inMemory()
}

// inMemory unpacks the kernel to a memfile. If that cannot be done, QEMU boots the image.
func (k kernel) inMemory() (bootable, error) {
	f, err := memfile.New("vmlinux")
	if err != nil {
		return bootable{}, err
	}
	_, err = k.unpack(f)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		return bootable{memory: f}, nil
	}
	f.Close()
	remedy := "reinstall it or give another --kernel"
	switch {
	case errors.Is(err, errBootAsIs):
		return bootable{path: k.path}, nil
	case errors.Is(err, errReplaced):
		remedy = "try again"
	}
	return bootable{}, missing(remedy, "unpacking %s: %w", k.path, err)
}

// prefix is what the names of all kernels in dir begin with that were unpacked from k.
func (k kernel) prefix(dir string) string {
	return filepath.Join(dir, "vmlinux-"+k.digest[:16]+"-")
}

// kept returns the name of the kernel that was kept in dir, or "". It removes damaged ones.
func (k kernel) kept(dir string) string {
	entries, _ := os.ReadDir(dir) // if it is unreadable, nothing is kept there
	for _, entry := range entries {
		name := filepath.Join(dir, entry.Name())
		sum, ours := strings.CutPrefix(name, k.prefix(dir))
		if !ours {
			continue
		}
		if is, err := fileDigest(name); err == nil && sum == is[:16] {
			return name
		}
		os.Remove(name)
	}
	return ""
}

func fileDigest(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, _, err := digest(f)
	return sum, err
}

// keep unpacks the kernel to a file in dir, and returns its name. A file of that name is left
// alone: two formats may unpack the same kernel at once.
func (k kernel) keep(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	f, err := tmpfile.Create(dir, 0o444)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, err := k.unpack(f)
	if err != nil {
		return "", err
	}
	// Another user's QEMU reads the file, whatever umask root has.
	if err := errors.Join(f.Chmod(0o444), f.Sync()); err != nil {
		return "", err
	}
	name := k.prefix(dir) + sum[:16]
	if err := tmpfile.Link(f, name); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return name, nil
}

// errReplaced means that a kernel's image has not the content any more that it had.
var errReplaced = errors.New("it was replaced meanwhile")

// unpack writes the kernel inside the image to an empty file, and returns its digest. What is
// read has to have the digest that is known: it decides the fingerprint. The error is
// [errBootAsIs] or [errReplaced], or says how the image is damaged.
func (k kernel) unpack(to *os.File) (string, error) {
	image, err := os.Open(k.path)
	if err != nil {
		return "", err
	}
	defer image.Close()
	// The window of a decompressor can be as large as the kernel, and is not needed again. The
	// runtime would keep it for minutes.
	defer debug.FreeOSMemory()
	read, written := sha256.New(), sha256.New()
	from := io.TeeReader(image, read)
	if err := k.form.unpack(io.MultiWriter(to, written), from); err != nil {
		return "", err
	}
	if _, err := io.Copy(io.Discard, from); err != nil {
		return "", err
	}
	if hex.EncodeToString(read.Sum(nil)) != k.digest {
		return "", errReplaced
	}
	if !k.form.ready(to) {
		return "", errors.New("it contains no ELF kernel")
	}
	return hex.EncodeToString(written.Sum(nil)), nil
}

// load returns the files of the named modules and of all they depend on, dependencies first. It
// leaves out modules that the kernel has built in.
func (k kernel) load(names []string) ([]string, error) {
	hint := k.modulesHint()
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
	for i, p := range paths {
		paths[i] = filepath.Join(k.modules, p)
	}
	return paths, nil
}

func (k kernel) modulesHint() string {
	return fmt.Sprintf("install the modules of kernel %s or give another --kernel", k.version)
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

// openModule opens a module, decompressed. Distributions compress modules in different ways, and
// the guest's loader takes none of them.
func openModule(name string) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil || filepath.Ext(name) == ".ko" {
		return f, err
	}
	defer f.Close()
	i := slices.IndexFunc(compressions, func(c compression) bool { return c.suffix != "" && c.suffix == filepath.Ext(name) })
	if i < 0 {
		return nil, fmt.Errorf("%s: its compression is unknown: .ko, .ko.xz, .ko.gz and .ko.zst can be read", name)
	}
	module, err := memfile.New("module")
	if err != nil {
		return nil, err
	}
	if _, err := compressions[i].decompress(module, f); err != nil {
		module.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return module, nil
}
