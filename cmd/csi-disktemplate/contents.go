// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/content"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/archive"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/disk"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/content/registry"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/disks"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// contentOptions are the flags of contents.
type contentOptions struct {
	file, dir, credentials string
	plainHTTP              []string
	cache                  size.Share
}

// builder makes the bytes of templates: filesystems by the formatter, empty or with a content, and disks. It
// joins the operator's contents to the formatter, and translates the errors of both.
type builder struct {
	formatter *vmformat.Formatter
	pool      *pool.Pool
	list      *content.Contents // nil if there are none
	images    *images
	watch     func(guest.Progress)  // if not nil, is told how far a template has come
	phases    func(vmformat.Report) // is told how each filesystem was made; may be nil

	mu    sync.Mutex
	under map[string]progressOf // by spec: the builds with a content that are under way
}

// progressOf is how far a build has come.
type progressOf struct {
	text        string // what is done
	done, total int64  // bytes that were unpacked
}

// newBuilder reads the list of contents, if there is one.
func newBuilder(ctx context.Context, o contentOptions, p *pool.Pool, formatter *vmformat.Formatter) (*builder, error) {
	b := &builder{formatter: formatter, pool: p, under: map[string]progressOf{}}
	if o.file == "" {
		return b, nil
	}
	var err error
	if b.images, err = newImages(o, p); err != nil {
		return nil, err
	}
	b.list = content.New(ctx, content.Config{
		Path: o.file, Dir: o.dir, State: filepath.Join(p.CacheDir(), "contents.json"), NewFile: p.NewTemplate,
		Resolve: b.images.client.Resolve, Layers: b.images.layers, PullDisk: b.images.disk, Convert: b.convert,
	})
	return b, nil
}

// run looks after the contents until ctx ends.
func (b *builder) run(ctx context.Context) {
	if b.list != nil {
		b.list.Run(ctx)
	}
}

// spare gives back space that is only kept to save time: saved VMs, and layers of images.
func (b *builder) spare() {
	b.formatter.Spare()
	if b.images != nil {
		b.images.trimTo(0)
	}
}

// content is [volume.Config].Content: nil if there are no contents.
func (b *builder) content() func(name, namespace string) (volume.Content, error) {
	if b.list == nil {
		return nil
	}
	return b.allowed
}

func (b *builder) allowed(name, namespace string) (volume.Content, error) {
	err := b.list.Check(name, namespace)
	if err != nil && namespace == "" {
		err = fmt.Errorf("%w; the provisioner tells the namespace of a claim with --extra-create-metadata", err)
	}
	if err != nil {
		return volume.Content{}, fmt.Errorf("%w: %w", errdefs.ErrInvalid, err)
	}
	c, err := b.list.Find(name)
	return volume.Content{Disk: c.Kind == content.Disk, Size: c.Size}, err
}

// resolve is [template.Config].Resolve.
func (b *builder) resolve(ctx context.Context, name string) error {
	if _, err := b.identity(name); !errors.Is(err, template.ErrUnresolved) {
		return err
	}
	return asTemplate(b.list.Resolve(ctx, name))
}

func (b *builder) identity(name string) (content.Identity, error) {
	if b.list == nil {
		return content.Identity{}, template.NoContent(fmt.Errorf("content %.64q: there is no list of contents; give --contents", name))
	}
	id, err := b.list.Identity(name)
	return id, asTemplate(err)
}

// asTemplate makes errors of contents those of templates.
func asTemplate(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, content.ErrResolving):
		return fmt.Errorf("%w: %w", template.ErrUnresolved, err)
	case errors.Is(err, content.ErrChanged):
		return fmt.Errorf("%w: %w", template.ErrChanged, err)
	case errors.Is(err, pool.ErrFull), errors.Is(err, context.Canceled), errors.Is(err, diskfs.ErrOutOfRange):
		return err
	}
	return template.NoContent(err)
}

// fingerprint is [template.Config].Fingerprint.
func (b *builder) fingerprint(spec diskfs.Spec) (string, error) {
	if spec.Content == "" {
		return b.formatter.Fingerprint(spec, nil)
	}
	id, err := b.identity(spec.Content)
	if err != nil {
		return "", err
	}
	return b.fingerprintOf(spec, id)
}

func (b *builder) fingerprintOf(spec diskfs.Spec, id content.Identity) (string, error) {
	if spec.IsDisk() {
		sum := sha256.Sum256([]byte("disk " + id.Digest)) // a raw disk is the same whoever converts it
		return hex.EncodeToString(sum[:])[:16], nil
	}
	return b.formatter.Fingerprint(spec, guestContent(id))
}

func guestContent(id content.Identity) *guest.Content {
	o := id.Options
	return &guest.Content{Digest: id.Digest, UID: o.UID, GID: o.GID, Mode: o.Mode, FSGroup: o.FSGroup}
}

// format is [template.Config].Format.
func (b *builder) format(ctx context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
	if spec.Content == "" {
		return b.filesystem(ctx, f, spec, nil)
	}
	id, err := b.identity(spec.Content)
	if err != nil {
		return template.Provenance{}, err
	}
	if (id.Kind == content.Disk) != spec.IsDisk() {
		return template.Provenance{}, fmt.Errorf("%w: content %s is of kind %s now; try again", template.ErrChanged, spec.Content, id.Kind)
	}
	defer b.tell(spec, progressOf{})
	if spec.IsDisk() {
		return b.disk(ctx, f, spec, id)
	}
	return b.filled(ctx, f, spec, id)
}

// filesystem has the formatter make a filesystem.
func (b *builder) filesystem(ctx context.Context, f *os.File, spec diskfs.Spec, fill *vmformat.Fill) (template.Provenance, error) {
	logged := time.Now()
	r, err := b.formatter.Format(ctx, f, spec, fill, func(p guest.Progress) {
		b.see(p)
		if fill == nil {
			return
		}
		b.tell(spec, unpacking(p))
		if p.Total > 0 && time.Since(logged) >= logInterval {
			logged = time.Now()
			klog.InfoS("Unpacking a content", "content", spec.Content, "spec", spec.String(), "doneBytes", p.Done, "archiveBytes", p.Total)
		}
	})
	switch {
	case errors.Is(err, vmformat.ErrTooSmall):
		return template.Provenance{}, fmt.Errorf("%w: content %s: %w", diskfs.ErrOutOfRange, spec.Content, err)
	case errors.Is(err, vmformat.ErrNoSpace):
		return template.Provenance{}, fmt.Errorf("%w: %w", pool.ErrFull, err)
	case errors.Is(err, vmformat.ErrUnavailable):
		return template.Provenance{}, template.NoFormatter(err)
	case err != nil:
		return template.Provenance{}, err
	}
	if b.phases != nil {
		b.phases(r)
	}
	if fill != nil {
		klog.InfoS("Unpacked a content", "content", spec.Content, "entries", r.Entries, "bytes", r.Bytes,
			"unpack", r.Unpack.Round(time.Millisecond), "check", r.Check.Round(time.Millisecond), "vm", r.Elapsed.Round(time.Millisecond))
	}
	return template.Provenance{
		Fingerprint: r.Fingerprint, UUID: r.UUID, Kernel: r.Kernel, Mkfs: r.Mkfs, Accelerator: string(r.Accelerator),
	}, nil
}

// logInterval is the time between two lines of the log about one content that is being unpacked.
const logInterval = 30 * time.Second

// filled makes a filesystem with a content. One that is too small is refused before a VM starts.
func (b *builder) filled(ctx context.Context, f *os.File, spec diskfs.Spec, id content.Identity) (template.Provenance, error) {
	if s, ok := b.list.Measured(id); ok {
		if err := checkNeeds(spec, s); err != nil {
			return template.Provenance{}, err
		}
	}
	p, err := b.prepare(ctx, spec, id)
	if err != nil {
		return template.Provenance{}, err
	}
	defer p.File.Close()
	if err := checkNeeds(spec, p.Summary); err != nil {
		return template.Provenance{}, err
	}
	fill := &vmformat.Fill{Content: *guestContent(id), Archive: p.File, Entries: p.Summary.Entries, Bytes: p.Summary.Bytes}
	for _, l := range p.Layers {
		fill.Layers = append(fill.Layers, guest.Layer(l))
	}
	made, err := b.filesystem(ctx, f, spec, fill)
	made.Content = id.Digest
	return made, err
}

// disk makes the raw disk of a content.
func (b *builder) disk(ctx context.Context, f *os.File, spec diskfs.Spec, id content.Identity) (template.Provenance, error) {
	p, err := b.prepare(ctx, spec, id)
	if err != nil {
		return template.Provenance{}, err
	}
	defer p.File.Close()
	if _, err = disks.Share(ctx, f, p.File); err == nil { // a cache may be where nothing can be cloned
		err = tmpfile.Sync(f)
	}
	if err != nil {
		return template.Provenance{}, pool.Full(err)
	}
	fp, err := b.fingerprintOf(spec, id)
	return template.Provenance{Fingerprint: fp, Content: id.Digest}, err
}

// prepare brings a content into the pool, in the form that the next step takes.
func (b *builder) prepare(ctx context.Context, spec diskfs.Spec, id content.Identity) (*content.Prepared, error) {
	b.tell(spec, progressOf{text: "its content is read and checked"})
	b.see(guest.Progress{Stage: stageRead})
	began := time.Now()
	p, err := b.list.Prepare(ctx, spec.Content, id)
	if err != nil {
		return nil, asTemplate(err)
	}
	klog.InfoS("Read a content", "content", spec.Content, "digest", id.Digest, "entries", p.Summary.Entries,
		"bytes", p.Summary.Bytes, "duration", time.Since(began).Round(time.Millisecond))
	return p, nil
}

// checkNeeds returns [diskfs.ErrOutOfRange] for a filesystem that is too small for a content.
func checkNeeds(spec diskfs.Spec, s archive.Summary) error {
	needs := s.Needs(spec.Filesystem, spec.Options, spec.Size)
	if needs <= spec.Size {
		return nil
	}
	return fmt.Errorf("%w: content %s has %s of data (entries: %d), and needs %s as %s; the volume has %s: ask for a larger size",
		diskfs.ErrOutOfRange, spec.Content, size.Format(s.Bytes), s.Entries, size.Format(needs), spec.Filesystem, size.Format(spec.Size))
}

// stageRead comes before the stages of the VM: a content is read.
const stageRead guest.Stage = "read"

// see tells watch how far a template has come.
func (b *builder) see(p guest.Progress) {
	if b.watch != nil {
		b.watch(p)
	}
}

// stageText says what the VM does at each stage.
var stageText = map[guest.Stage]string{
	guest.StageBoot: "the VM boots", guest.StageMkfs: "the filesystem is made", guest.StageUnpack: "its content is unpacked",
	guest.StageCheck: "it is checked", guest.StageDone: "it is kept",
}

// unpacking says how far the VM has come.
func unpacking(p guest.Progress) progressOf {
	of := progressOf{text: stageText[p.Stage], done: p.Done, total: p.Total}
	if p.Total > 0 {
		of.text = fmt.Sprintf("unpacking its content, %d%% of %s", 100*p.Done/p.Total, size.Format(p.Total))
	}
	return of
}

// tell notes how far a build has come, or, with the zero value, that it has ended.
func (b *builder) tell(spec diskfs.Spec, p progressOf) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p == (progressOf{}) {
		delete(b.under, spec.String())
		return
	}
	b.under[spec.String()] = p
}

// unpacked sums the bytes of the archives that are being unpacked: what is done, and all.
func (b *builder) unpacked() (done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.under {
		done, total = done+p.done, total+p.total
	}
	return done, total
}

// progress is [template.Config].Progress.
func (b *builder) progress(spec diskfs.Spec) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.under[spec.String()].text
}

// convert makes a raw disk of a file of --content-dir.
func (b *builder) convert(ctx context.Context, dst, src *os.File) error {
	format, _, err := disk.Inspect(src)
	if err != nil {
		return err
	}
	if format == disk.Raw {
		return disk.Convert(ctx, dst, src, format)
	}
	own, err := disk.Copy(ctx, filepath.Dir(b.pool.Template("x")), src) // others may write to src
	if err != nil {
		return err
	}
	defer own.Close()
	return disk.Convert(ctx, dst, own, format)
}

// images are those of registries, with their blobs in the pool.
type images struct {
	client *registry.Client
	blobs  *registry.Blobs
	pool   *pool.Pool
	cache  size.Share
}

func newImages(o contentOptions, p *pool.Pool) (*images, error) {
	blobs, err := registry.OpenBlobs(filepath.Join(p.CacheDir(), "blobs"))
	if err != nil {
		return nil, err
	}
	i := &images{blobs: blobs, pool: p, cache: o.cache}
	i.client = registry.New(registry.Config{Credentials: o.credentials, PlainHTTP: o.plainHTTP, Room: i.room})
	return i, nil
}

// room returns [pool.ErrFull] if the pool has no room for so many bytes.
func (i *images) room(bytes int64) error {
	s, err := i.pool.Space()
	if err != nil || bytes <= s.Available {
		return err
	}
	return fmt.Errorf("%w: %s are to be pulled, and %s are free; delete volumes, %s, or enlarge the pool",
		pool.ErrFull, size.Format(bytes), size.Format(s.Available), pool.DropTemplates())
}

// layers is [content.Config].Layers.
func (i *images) layers(ctx context.Context, reference string) iter.Seq2[io.Reader, error] {
	return func(yield func(io.Reader, error) bool) {
		image, err := i.client.Pull(ctx, reference, i.blobs)
		if err != nil {
			yield(nil, err)
			return
		}
		defer i.trim()
		defer image.Close()
		for _, l := range image.Layers {
			r, err := l.Open()
			if err != nil {
				yield(nil, err)
				return
			}
			more := yield(r, nil)
			r.Close()
			if !more {
				return
			}
		}
	}
}

// trim meets --content-cache.
func (i *images) trim() {
	if i.cache == (size.Share{}) {
		return
	}
	if layers, err := i.pool.Layers(); err == nil {
		i.trimTo(i.cache.Of(layers[0].Total))
	}
}

func (i *images) trimTo(budget int64) {
	removed, err := i.blobs.Trim(budget)
	if err != nil {
		logs.Warn("Layers of images were not removed from the pool, although others need their space", "err", err)
	}
	if removed > 0 {
		klog.InfoS("Removed layers of images", "bytes", removed)
	}
}

// disk is [content.Config].PullDisk: the layers become plain archives, the disk is found in them, and converted.
func (i *images) disk(ctx context.Context, dst *os.File, reference string) error {
	plain, err := i.pool.NewTemplate()
	if err != nil {
		return err
	}
	defer plain.Close()
	w := archive.NewWriter(plain, archive.Limits{})
	var layers []io.Reader
	for r, err := range i.layers(ctx, reference) {
		if err != nil {
			return err
		}
		l, err := w.Add(ctx, r)
		if err != nil {
			return fmt.Errorf("layer %d: %w", len(layers)+1, err)
		}
		layers = append(layers, io.NewSectionReader(plain, l.Offset, l.Length))
	}
	found, name, err := disk.Find(ctx, filepath.Dir(i.pool.Template("x")), diskfs.MaxSize, layers...)
	if err != nil {
		return err
	}
	defer found.Close()
	format, _, err := disk.Inspect(found)
	if err == nil {
		err = disk.Convert(ctx, dst, found, format)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
