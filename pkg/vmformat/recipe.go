// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// recipe is everything but the job that decides the bytes of a filesystem's templates, as data:
// the kernel and the files beside it. The machine is the one that they are for. The files' content
// is tens of MiB: it is read when it is packed or hashed, and never kept.
//
// The binary that is init does not decide them. Its part is the guest's source, which is in the
// fingerprint: see [guest.Source].
type recipe struct {
	machine machine
	kernel  kernel
	files   map[string]file // by path in the initramfs; all of it but init and the job
	init    map[string]file // the binary, and its libraries if it has any
	setup   guest.Setup
}

type file struct {
	mode uint64
	from string // the file of this machine
	open func() (*os.File, error)
}

const modulesDir = "/modules/"

// gather reads everything that formatting a filesystem needs.
func (f *Formatter) gather(filesystem string) (*recipe, error) {
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		return nil, err
	}
	m, err := machineOf(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	// The quick searches come first. As long as a program is missing, every request comes
	// here again.
	programs := map[string]string{}
	for _, name := range []string{fs.Mkfs, fs.Checker} {
		if programs["/bin/"+name], err = findTool(name, fs.Package); err != nil {
			return nil, err
		}
	}
	k, err := f.readKernel(m)
	if err != nil {
		return nil, err
	}
	r := &recipe{machine: m, kernel: k, files: map[string]file{}, init: map[string]file{}}
	for at, from := range programs {
		if err := addProgram(r.files, at, from); err != nil {
			return nil, err
		}
	}
	if err := addProgram(r.init, guest.InitPath, f.cfg.Init); err != nil {
		return nil, err
	}
	r.setup.Version = []string{"/bin/" + fs.Mkfs, "-V"}
	modules, err := k.load(slices.Concat(m.modules, fs.Modules))
	if err != nil {
		return nil, err
	}
	all, err := k.load(m.transports)
	if err != nil {
		return nil, err
	}
	for _, name := range modules {
		r.setup.Modules = append(r.setup.Modules, r.addModule(name, k.modulesHint()))
	}
	for _, name := range all {
		if !slices.Contains(modules, name) {
			r.setup.Transports = append(r.setup.Transports, r.addModule(name, k.modulesHint()))
		}
	}
	return r, nil
}

// addModule adds a kernel module, and returns its path.
func (r *recipe) addModule(name, hint string) string {
	at := modulesDir + moduleName(name) + ".ko"
	r.files[at] = file{mode: cpio.S_IFREG | 0o444, from: name, open: func() (*os.File, error) {
		f, err := openModule(name)
		if err != nil {
			return nil, missing(hint, "%w", err)
		}
		return f, nil
	}}
	return at
}

// newJob decides every command that the guest will run for a template. Without a content the
// filesystem stays empty.
func newJob(spec diskfs.Spec, c *guest.Content) (guest.Job, error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return guest.Job{}, err
	}
	job := guest.Job{
		Filesystem: spec.Filesystem,
		Size:       spec.Size,
		Label:      spec.Label,
		Mkfs:       append([]string{"/bin/" + fs.Mkfs}, fs.MkfsArgs(guest.DevicePlaceholder, spec.Label, spec.Options)...),
		Check:      append([]string{"/bin/" + fs.Checker}, fs.CheckArgs(guest.DevicePlaceholder)...),
		MountData:  strings.Join(fs.ROMountData, ","),
	}
	if c != nil {
		job.Content, job.FillData = c, strings.Join(fs.FillMountData, ",")
	}
	return job, nil
}

// addProgram adds an executable, its loader and its libraries.
func addProgram(files map[string]file, at, from string) error {
	needs, err := programFiles(from)
	if err != nil {
		return err
	}
	needs[at] = from
	for at, from := range needs {
		if _, have := files[at]; have {
			continue
		}
		files[at] = file{mode: cpio.S_IFREG | 0o555, from: from, open: func() (*os.File, error) {
			f, err := os.Open(from)
			if err != nil {
				return nil, missing("reinstall its package", "%w", err)
			}
			return f, nil
		}}
	}
	return nil
}

// sources lists the files of this machine that the recipe consists of, and more.
func (r *recipe) sources(more ...string) []string {
	paths := append(more, r.kernel.path)
	for _, files := range []map[string]file{r.files, r.init} {
		for _, f := range files {
			paths = append(paths, f.from)
		}
	}
	return paths
}

// writeFiles packs files in the format that the kernel unpacks: first the directories, then the
// files, by name. The same files give the same bytes.
func writeFiles(w io.Writer, files map[string]file, more ...string) error {
	rw := cpio.Newc.Writer(w)
	if err := cpio.WriteRecords(rw, directories(files, more)); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := files[name].write(rw, name); err != nil {
			return err
		}
	}
	return nil
}

// directories lists the directories that files are in, and more.
func directories(files map[string]file, more []string) []cpio.Record {
	dirs := map[string]bool{}
	for _, name := range more {
		dirs[name] = true
	}
	for name := range files {
		for d := path.Dir(name); d != "/"; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	var rs []cpio.Record
	for _, d := range slices.Sorted(maps.Keys(dirs)) {
		rs = append(rs, cpio.Directory(d[1:], 0o755))
	}
	return rs
}

// write packs one file. It reads the file piece by piece.
func (f file) write(rw cpio.RecordWriter, name string) error {
	from, err := f.open()
	if err != nil {
		return err
	}
	defer from.Close()
	fi, err := from.Stat()
	if err != nil {
		return err
	}
	err = rw.WriteRecord(cpio.Record{
		ReaderAt: io.NewSectionReader(from, 0, fi.Size()),
		Info:     cpio.Info{Name: name[1:], Mode: f.mode, FileSize: uint64(fi.Size())},
	})
	if now, statErr := from.Stat(); err != nil && statErr == nil && now.Size() < fi.Size() {
		err = errors.New("it became shorter meanwhile; try again")
	}
	if err != nil {
		return fmt.Errorf("packing %s for the VM: %w", from.Name(), err)
	}
	return nil
}

// initramfs packs the whole archive: the files, init, its setup, and as the last entry the marker,
// which tells the guest that nothing is missing. It returns the base digest of the very bytes
// that it wrote: see baseDigest.
func (r *recipe) initramfs(w io.Writer) (base string, err error) {
	setup, err := json.Marshal(r.setup)
	if err != nil {
		return "", err
	}
	h := r.newBase()
	if err := writeFiles(io.MultiWriter(w, h), r.files); err != nil {
		return "", err
	}
	if err := writeFiles(w, r.init, "/proc", "/sys", "/dev", "/mnt"); err != nil {
		return "", err
	}
	err = cpio.WriteRecords(cpio.Newc.Writer(w), []cpio.Record{
		cpio.CharDev("dev/console", 0o600, 5, 1), // init's stdout before devtmpfs is mounted
		cpio.StaticFile(guest.SetupPath[1:], string(setup), 0o444),
		cpio.StaticFile(guest.MarkerPath[1:], guest.Marker, 0o444),
		cpio.TrailerRecord,
	})
	if err != nil {
		return "", fmt.Errorf("packing the VM's setup: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// newBase begins a base digest.
func (r *recipe) newBase() hash.Hash {
	h := sha256.New()
	io.WriteString(h, r.kernel.digest)
	io.WriteString(h, guest.Source())
	return h
}

// baseDigest is the part of the fingerprint that all templates of a filesystem share. It
// covers everything but the job. Of init it covers the source: another build of the same source
// makes the same templates.
func (r *recipe) baseDigest() (string, error) {
	h := r.newBase()
	err := writeFiles(h, r.files)
	return hex.EncodeToString(h.Sum(nil)), err
}

// fingerprint condenses a base digest and a job to 16 hex digits. The setup is in neither: the
// order of the modules follows from the modules, which the base covers.
func fingerprint(base string, job guest.Job) string {
	b, err := json.Marshal(job)
	if err != nil {
		panic(err) // cannot happen: a job is strings and numbers
	}
	h := sha256.New()
	io.WriteString(h, base)
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil))[:16]
}
