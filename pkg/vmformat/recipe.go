// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package vmformat

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
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

// recipe is everything that decides the bytes of a template, as data: the kernel, the files
// beside it, and the job. The machine is the one that they are for.
type recipe struct {
	machine machine
	kernel  kernel
	files   map[string]file // by path in the initramfs
	job     guest.Job
}

type file struct {
	mode    uint64
	content []byte
}

const modulesDir = "/modules/"

// gather reads everything that formatting spec's filesystem needs.
func (f *Formatter) gather(spec diskfs.Spec) (*recipe, error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return nil, err
	}
	m, err := machineOf(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	// The quick searches come first. As long as a program is missing, every request comes
	// here again.
	programs := map[string]string{guest.InitPath: f.cfg.Init}
	for _, name := range []string{fs.Mkfs, fs.Checker} {
		if programs["/bin/"+name], err = findTool(name, fs.Package); err != nil {
			return nil, err
		}
	}
	k, err := f.readKernel(m)
	if err != nil {
		return nil, err
	}
	r := &recipe{machine: m, kernel: k, files: map[string]file{}}
	for at, from := range programs {
		if err := r.addProgram(at, from); err != nil {
			return nil, err
		}
	}
	modules, err := k.load(append(slices.Clone(m.modules), fs.Modules...))
	if err != nil {
		return nil, err
	}
	var order []string
	for _, m := range modules {
		at := modulesDir + m.name + ".ko"
		r.files[at] = file{mode: cpio.S_IFREG | 0o444, content: m.content}
		order = append(order, at)
	}
	r.job, err = newJob(spec, order)
	return r, err
}

// newJob decides every command that the guest will run.
func newJob(spec diskfs.Spec, modules []string) (guest.Job, error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return guest.Job{}, err
	}
	mkfs := "/bin/" + fs.Mkfs
	return guest.Job{
		Filesystem: spec.Filesystem,
		Size:       spec.Size,
		Label:      spec.Label,
		Modules:    modules,
		Version:    []string{mkfs, "-V"},
		Mkfs:       append([]string{mkfs}, fs.MkfsArgs(guest.DevicePlaceholder, spec.Label, spec.Options)...),
		Check:      append([]string{"/bin/" + fs.Checker}, fs.CheckArgs(guest.DevicePlaceholder)...),
		MountData:  strings.Join(fs.ROMountData, ","),
	}, nil
}

// addProgram adds an executable, its loader and its libraries.
func (r *recipe) addProgram(at, from string) error {
	needs, err := programFiles(from)
	if err != nil {
		return err
	}
	needs[at] = from
	for at, from := range needs {
		if _, have := r.files[at]; have {
			continue
		}
		b, err := os.ReadFile(from)
		if err != nil {
			return missing("reinstall its package", "%w", err)
		}
		r.files[at] = file{mode: cpio.S_IFREG | 0o555, content: b}
	}
	return nil
}

// records lists the archive's entries: first the directories, then the files, by name.
func (r *recipe) records() []cpio.Record {
	dirs := map[string]bool{"/proc": true, "/sys": true, "/dev": true, "/mnt": true}
	for name := range r.files {
		for d := path.Dir(name); d != "/"; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	var rs []cpio.Record
	for _, d := range slices.Sorted(maps.Keys(dirs)) {
		rs = append(rs, cpio.Directory(d[1:], 0o755))
	}
	rs = append(rs, cpio.CharDev("dev/console", 0o600, 5, 1)) // init's stdout before devtmpfs is mounted
	for _, name := range slices.Sorted(maps.Keys(r.files)) {
		f := r.files[name]
		rs = append(rs, cpio.StaticRecord(f.content, cpio.Info{Name: name[1:], Mode: f.mode}))
	}
	return rs
}

// write packs records in the format that the kernel unpacks. The same records give the same
// bytes.
func write(w io.Writer, rs []cpio.Record) error {
	rw := cpio.Newc.Writer(w)
	cpio.MakeAllReproducible(rs)
	return cpio.WriteRecords(rw, rs)
}

// initramfs packs the whole archive: the files, the job, and as the last entry the marker,
// which tells the guest that nothing is missing.
func (r *recipe) initramfs() ([]byte, error) {
	job, err := json.Marshal(r.job)
	if err != nil {
		return nil, err
	}
	rs := append(r.records(),
		cpio.StaticFile(guest.JobPath[1:], string(job), 0o444),
		cpio.StaticFile(guest.MarkerPath[1:], guest.Marker, 0o444))
	var b bytes.Buffer
	if err := write(&b, rs); err != nil {
		return nil, fmt.Errorf("packing the initramfs: %w", err)
	}
	if err := cpio.WriteTrailer(cpio.Newc.Writer(&b)); err != nil {
		return nil, fmt.Errorf("packing the initramfs: %w", err)
	}
	return b.Bytes(), nil
}

// baseDigest is the part of the fingerprint that all templates of a filesystem share. It
// covers everything but the job.
func (r *recipe) baseDigest() string {
	h := sha256.New()
	io.WriteString(h, r.kernel.digest)
	if err := write(h, r.records()); err != nil {
		panic(err) // cannot happen: a hash accepts every write, and the records are in memory
	}
	return hex.EncodeToString(h.Sum(nil))
}

// fingerprint condenses a base digest and a job to 16 hex digits. It leaves out the module
// paths: their order follows from the modules, which the base covers.
func fingerprint(base string, job guest.Job) string {
	job.Modules = nil
	b, err := json.Marshal(job)
	if err != nil {
		panic(err) // cannot happen: a job is strings and numbers
	}
	h := sha256.New()
	io.WriteString(h, base)
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil))[:16]
}
