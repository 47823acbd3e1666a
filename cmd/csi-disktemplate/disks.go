// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/disks"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
)

// diskOptions are the flags of `csi-disktemplate format`.
type diskOptions struct {
	formatOptions
	output      string
	count       int // 0 is one, whose name has no number
	cache       string
	force, json bool
}

func (o *diskOptions) add(f *pflag.FlagSet) {
	o.addSpec(f)
	addValueP(f, &o.output, "output", "o", "", newFile, "the image to make; with -n its name has {} for the number")
	addValueP(f, &o.count, "count", "n", "", optionalCount, "how many images to make (default: one, without a number)")
	addValue(f, &o.cache, "cache", "", checked(func(string) error { return nil }),
		"directory that keeps what was formatted, for later runs; made if missing, and may be deleted when no run uses it"+
			" (default: nothing is kept)")
	f.BoolVar(&o.force, "force", false, "replace files that exist")
	f.BoolVar(&o.json, "json", false, "print what was made as JSON")
	o.addContent(f)
	addVM(f, &o.vm)
}

// optionalCount is a number of things, or 0 for the empty text.
var optionalCount = kindOf("int", "must be a whole number of at least 1", func(s string) (int, bool) {
	if s == "" {
		return 0, true
	}
	n, err := strconv.Atoi(s)
	return n, err == nil && n >= 1
})

// quiet leaves nothing of the log: progress and errors are printed.
func quiet() {
	var all flag.FlagSet
	klog.InitFlags(&all)
	all.Set("logtostderr", "false")
	all.Set("stderrthreshold", "FATAL")
	klog.SetOutput(io.Discard)
}

// number stands for the number of an image in --output.
const number = "{}"

// paths are the images to make.
func (o *diskOptions) paths() ([]string, error) {
	if o.count == 0 {
		return []string{o.output}, nil
	}
	if !strings.Contains(o.output, number) {
		return nil, badFlag("output", o.output,
			errors.New("must have {} where the number of each image goes, as 'disk-{}.img'"))
	}
	var all []string
	for i := range o.count {
		all = append(all, strings.ReplaceAll(o.output, number, strconv.Itoa(i+1)))
	}
	return all, nil
}

// checkPaths returns an error if there is something at a path that may not be replaced. It comes
// before any work. Whoever takes a name meanwhile keeps it.
func (o *diskOptions) checkPaths(paths []string) error {
	var there []string
	for _, path := range paths {
		fi, err := os.Lstat(path)
		if err != nil || o.force && fi.Mode().IsRegular() {
			continue
		}
		if o.force {
			return badFlag("output", path, errors.New("is not a regular file, so it is not replaced; give another name"))
		}
		there = append(there, path)
	}
	switch {
	case len(there) == 0:
		return nil
	case len(paths) == 1:
		return badFlag("output", o.output,
			errors.New("exists already; remove it, give another name, or replace it with --force"))
	}
	return badFlag("output", o.output, fmt.Errorf(
		"%d of the %d files exist already, the first is %s; remove them, give another name, or replace them with --force",
		len(there), len(paths), there[0]))
}

// made is what a run has made, and of what.
type made struct {
	spec  diskfs.Spec
	from  origin
	disks []disks.Made
	took  time.Duration
}

// origin tells how the image came to be that the others are made of.
type origin struct {
	template.Provenance
	key string // of the template; "" without a cache
	hit bool   // it was in the cache before
}

// run makes the images, and says what it made: also when it fails in between.
func (o *diskOptions) run(ctx context.Context, out, w io.Writer) error {
	paths, err := o.paths()
	if err == nil {
		err = o.checkPaths(paths)
	}
	if err == nil && o.content != "" && o.cache == "" {
		err = badFlag("content", o.content, errors.New("needs --cache: a content is read, checked and kept there"))
	}
	if err != nil {
		return err
	}
	began := time.Now()
	m, err := o.make(ctx, w, paths)
	m.took = time.Since(began)
	if o.json && len(m.disks) > 0 {
		err = errors.Join(err, m.printJSON(out))
	} else if len(m.disks) > 0 {
		m.print(w, paths, o.cache)
	}
	return o.explain(err, len(m.disks), len(paths))
}

// explain makes errors of a run those of its flags, and says how far it came.
func (o *diskOptions) explain(err error, done, want int) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EFBIG):
		err = badFlag("size", o.size, fmt.Errorf(
			"the filesystem of %s holds no file of that size; choose a directory on btrfs or xfs", filepath.Dir(o.output)))
	case errors.Is(err, disks.ErrUnusable), errors.Is(err, os.ErrExist):
		err = badFlag("output", o.output, err)
	case errors.Is(err, disks.ErrTooSmall):
		err = badFlag("size", o.size, err)
	case errors.Is(err, pool.ErrFull): // says what to do
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		err = fmt.Errorf("%w; make room on its filesystem", err)
	}
	if want > 1 {
		err = fmt.Errorf("%d of %d images were made, and no part of another one: %w", done, want, err)
	}
	return err
}

// make makes the images, of a template in the cache or of one that goes with this run.
func (o *diskOptions) make(ctx context.Context, w io.Writer, paths []string) (made, error) {
	if o.cache != "" {
		return o.makeCached(ctx, w, paths)
	}
	spec, err := o.spec()
	m := made{spec: spec}
	if err != nil {
		return m, err
	}
	source := disks.Source{Spec: spec}
	if fs, err := diskfs.Lookup(spec.Filesystem); err != nil {
		return m, err
	} else if !fs.Formatted() {
		m.disks, err = source.Make(ctx, paths, o.force)
		return m, err
	}
	first, err := disks.NewFile(filepath.Dir(paths[0]))
	if err != nil {
		return m, err
	}
	defer first.Close()
	if m.from, err = o.format(ctx, w, first, spec); err != nil {
		return m, err
	}
	if len(paths) == 1 { // the only one needs no other to be made of
		m.disks, err = publish(first, m.from.UUID, paths[0], o.force)
		return m, err
	}
	source.File = first
	m.disks, err = source.Make(ctx, paths, o.force)
	return m, err
}

// publish names the only image.
func publish(f *os.File, id, path string, force bool) ([]disks.Made, error) {
	own, err := uuid.Parse(id)
	if err != nil {
		return nil, err
	}
	d := disks.Disk{File: f, UUID: own}
	one, err := d.Publish(path, force)
	if err != nil {
		return nil, err
	}
	return []disks.Made{one}, nil
}

// format formats a file that no cache will have.
func (o *diskOptions) format(ctx context.Context, w io.Writer, f *os.File, spec diskfs.Spec) (origin, error) {
	formatter, err := newFormatter(o.vm, "")
	if err != nil {
		return origin{}, err
	}
	watch, end := watching(w, formatter)
	r, err := formatter.Format(ctx, f, spec, nil, watch)
	end(err)
	return origin{Provenance: template.Provenance{
		Fingerprint: r.Fingerprint, UUID: r.UUID, Kernel: r.Kernel, Mkfs: r.Mkfs, Accelerator: string(r.Accelerator),
	}}, err
}

// makeCached makes the images of a template in the cache, and builds that if need be.
func (o *diskOptions) makeCached(ctx context.Context, w io.Writer, paths []string) (m made, err error) {
	pool.MakeRoom = "make room on its filesystem, or delete " + o.cache
	p, err := pool.OpenCache(o.cache)
	if err != nil {
		return m, badFlag("cache", o.cache, err)
	}
	defer p.Close()
	formatter, err := newFormatter(o.vm, p.CacheDir())
	if err != nil {
		return m, err
	}
	b, err := newBuilder(ctx, o.contents, p, formatter)
	if err != nil {
		return m, err
	}
	if m.spec, err = o.specOf(ctx, b); err != nil {
		return m, err
	}
	if fs, err := diskfs.Lookup(m.spec.Filesystem); err == nil && !fs.Formatted() && m.spec.Content == "" {
		m.disks, err = disks.Source{Spec: m.spec}.Make(ctx, paths, o.force) // nothing to keep
		return m, err
	}
	t, err := b.template(ctx, w, m.spec)
	if err != nil {
		return m, err
	}
	defer t.Close()
	m.from = origin{Provenance: t.Provenance, key: t.Key, hit: t.Hit}
	if m.spec.IsDisk() {
		if m.spec.Size, err = o.sizeOfDisk(t.Bytes); err != nil {
			return m, err
		}
	}
	m.disks, err = disks.Source{File: t.File, Spec: m.spec}.Make(ctx, paths, o.force)
	return m, err
}

// sizeOfDisk is the size of images of a whole disk: that of the disk, unless --size asks for another.
func (o *diskOptions) sizeOfDisk(has int64) (int64, error) {
	if o.size == "" {
		return has, nil
	}
	fs, err := diskfs.Lookup(diskfs.Disk)
	if err != nil {
		return 0, err
	}
	return o.sizeOf(fs)
}

// template returns a template, and prints how its build goes.
func (b *builder) template(ctx context.Context, w io.Writer, spec diskfs.Spec) (*template.Template, error) {
	store := b.store()
	defer store.Close()
	watch, end := watching(w, b.formatter)
	b.watch = watch
	_, why := store.KeyOf(spec)
	sayDamaged(w, store, spec)
	t, err := store.Ensure(ctx, spec)
	if ctx.Err() != nil { // Ensure tells its caller to ask again
		err = fmt.Errorf("canceled while the template was made: %w", context.Cause(ctx))
	}
	end(err)
	if err == nil && why != nil {
		fmt.Fprintf(w, "nothing can be formatted here; an earlier template is used: %v\n", why)
	}
	return t, err
}

// sayDamaged says that a template is built again since it is damaged.
func sayDamaged(w io.Writer, store *template.Store, spec diskfs.Spec) {
	key, err := store.KeyOf(spec)
	if err != nil {
		return
	}
	t, err := store.Lookup(key)
	if err == nil {
		t.Close()
	} else if errors.Is(err, template.ErrCorrupt) {
		fmt.Fprintf(w, "%v; it is built again\n", err)
	}
}

// watching returns what prints the progress of a format, and its end. It says first why a VM emulates.
func watching(w io.Writer, formatter *vmformat.Formatter) (watch func(guest.Progress), end func(error)) {
	p := newProgress(w)
	said := sync.OnceFunc(func() {
		if _, why, err := formatter.Accelerator(); err == nil && why != nil {
			fmt.Fprintf(w, "accelerator tcg, which is slower than kvm: %v\n", why)
		}
	})
	return func(at guest.Progress) {
		if at.Stage != stageRead { // there may be no VM
			said()
		}
		p.enter(at)
	}, p.end
}

// print says for people what was made, and what it costs.
func (m made) print(w io.Writer, paths []string, cache string) {
	first := m.disks[0]
	what := first.Path
	if len(m.disks) > 1 {
		what = fmt.Sprintf("%d images, %s", len(m.disks), ranges(m.disks, paths))
	}
	what += fmt.Sprintf(": %s", m.spec)
	if len(m.disks) == 1 && first.UUID != uuid.Nil {
		what += ", UUID " + first.UUID.String()
	}
	if m.from.Mkfs != "" {
		what += fmt.Sprintf(", made by %s on Linux %s under %s", m.from.Mkfs, m.from.Kernel, m.from.Accelerator)
	}
	fmt.Fprintf(w, "%s (%s)\n", what, m.took.Round(time.Millisecond))
	if m.from.key != "" {
		how := map[bool]string{true: "was there", false: "was built"}[m.from.hit]
		fmt.Fprintf(w, "template %s %s, in %s\n", m.from.key, how, cache)
	}
	if m.from.key != "" || len(m.disks) > 1 {
		fmt.Fprintln(w, m.cost())
	}
}

// ranges names the images that were made, of those at paths: the first and last of each row without a gap.
func ranges(made []disks.Made, paths []string) string {
	there := map[string]bool{}
	for _, d := range made {
		there[d.Path] = true
	}
	var rows []string
	for i := 0; i < len(paths); i++ {
		first := i
		for i < len(paths) && there[paths[i]] {
			i++
		}
		switch i - first {
		case 0:
		case 1:
			rows = append(rows, paths[first])
		default:
			rows = append(rows, paths[first]+" to "+paths[i-1])
		}
	}
	return strings.Join(rows, ", ")
}

// cost says whether the images share their extents, and what space they take.
func (m made) cost() string {
	own, first := int64(0), m.disks[0]
	for _, d := range m.disks {
		own += d.Takes
	}
	each := size.Format(own / int64(len(m.disks)))
	switch {
	case first.Copied != "":
		return fmt.Sprintf("copies, since %s: each takes %s, all of them %s", first.Copied, each, size.Format(own))
	case first.Shares > 0:
		return fmt.Sprintf("clones: each takes %s, all of them %s, and they share %s",
			each, size.Format(own), size.Format(first.Shares))
	}
	return fmt.Sprintf("each takes %s, all of them %s", each, size.Format(own))
}

// madeDisk is an image as it is printed.
type madeDisk struct {
	Path  string `json:"path"`
	UUID  string `json:"uuid,omitempty"`
	Takes int64  `json:"takesBytes"`
}

func (m made) printJSON(out io.Writer) error {
	var all []madeDisk
	for _, d := range m.disks {
		one := madeDisk{Path: d.Path, Takes: d.Takes}
		if d.UUID != uuid.Nil {
			one.UUID = d.UUID.String()
		}
		all = append(all, one)
	}
	sums := map[string]any{
		"filesystem": m.spec.Filesystem, "sizeBytes": m.spec.Size, "elapsedMillis": m.took.Milliseconds(),
		"sharesBytes": m.disks[0].Shares,
	}
	for key, text := range map[string]string{
		"label": m.spec.Label, "content": m.spec.Content, "copiedBecause": m.disks[0].Copied, "template": m.from.key,
		"mkfs": m.from.Mkfs, "kernel": m.from.Kernel, "accelerator": m.from.Accelerator,
	} {
		if text != "" {
			sums[key] = text
		}
	}
	if m.from.key != "" {
		sums["templateHit"] = m.from.hit
	}
	return plan[madeDisk]{actions: all, name: "disks", sums: sums}.printObject(out, "json")
}
