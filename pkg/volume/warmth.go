// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/meminfo"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/warm"
)

// warmth knows which new volumes can be taken from those that are kept ready.
type warmth struct {
	pool      *pool.Pool
	stock     *warm.Stock
	templates *template.Store
}

// kind is the kind of ready volume that a new volume can be made of. fits is false if there is
// none: for copies, empty disks and thick volumes.
func (w warmth) kind(r image.Record, from *golden.Golden) (k warm.Kind, fits bool) {
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if w.stock == nil || err != nil || !fs.Formatted() || r.Source != (image.Source{}) || !r.Provisioning.SharesExtents() {
		return k, false
	}
	k.Form = warm.Unnamed
	// Attributes are only added to a mount, and options of the filesystem are there from the start.
	if r.Lifecycle == image.Inline && r.Mode == image.ModeFilesystem && !r.SUID && !r.Dev && r.Context == "" {
		k.Form = warm.Mounted
		if r.Durability.DropsFlushes() {
			k.Form = warm.Volatile
		}
	}
	if from != nil {
		k.Golden = ready(from.Record)
		return k, r.Spec.Size == from.Record.Spec.Size
	}
	k.Template, err = w.templates.KeyOf(r.Spec)
	return k, err == nil
}

// take takes a volume that is ready, or returns nil. It counts as a use of the template. From a pool
// that fails [pool.Pool.Check] it takes none: making a volume then says why.
func (w warmth) take(k warm.Kind) *warm.Volume {
	if w.pool.Check() != nil {
		return nil
	}
	v := w.stock.Take(k)
	if v != nil && k.Template != "" {
		w.templates.Touch(k.Template)
	}
	return v
}

// want has more volumes of a kind be kept ready, now that its template is there.
func (w warmth) want(k warm.Kind, r image.Record) {
	if r.Template == k.Template { // and not that of an earlier formatter
		w.stock.Want(k, r.Spec)
	}
}

// stockConfig joins the stock of ready volumes to the rest.
func (m *Manager) stockConfig(c Config) warm.Config {
	return warm.Config{
		Level: c.Warm, Most: c.WarmMost,
		Make: m.makeReady, Quiet: m.locks.quiet, Room: m.roomForReady,
		Recall: m.contents.warm.recall, Note: m.contents.warm.note,
	}
}

// ready names a generation in a [warm.Kind]. A number may come again, when a command has removed the newest
// generation. A UUID does not.
func ready(r golden.Record) string { return r.Is().String() + " " + r.UUID.String() }

// ofReady is the generation that ready names. It is the zero value for a kind that is made of a template.
func ofReady(k warm.Kind) golden.Generation {
	text, _, _ := strings.Cut(k.Golden, " ")
	g, _ := golden.ParseGeneration(text)
	return g
}

// renew has volumes be kept ready of a golden's newest generation, where they were kept of another one.
func (w warmth) renew(is golden.Record) {
	w.stock.Replace(func(k warm.Kind) (warm.Kind, bool) {
		if ofReady(k).Name == is.Is().Name {
			k.Golden = ready(is)
		}
		return k, true
	})
}

// keep gives back what is ready of generations that are not among these.
func (w warmth) keep(all []golden.Held) {
	there := map[golden.Generation]bool{{}: true} // and what is ready of templates
	for _, h := range all {
		there[h.Generation] = true
	}
	w.stock.Replace(func(k warm.Kind) (warm.Kind, bool) { return k, there[ofReady(k)] })
}

// cloneKind gives an empty file the content that volumes of a kind have, with an identity of its own. It returns
// [os.ErrNotExist] while there is no such template or golden.
func (m *Manager) cloneKind(ctx context.Context, f *os.File, k warm.Kind) (id uuid.UUID, err error) {
	if k.Golden == "" {
		t, err := m.contents.templates.Lookup(k.Template)
		if err != nil {
			return id, err
		}
		defer t.Close()
		return m.contents.clone(ctx, f, t, image.Thin)
	}
	from, err := m.goldens.Open(ofReady(k))
	if errors.Is(err, errdefs.ErrNotFound) {
		err = fmt.Errorf("%w: %w", os.ErrNotExist, err)
	}
	if err != nil {
		return id, err
	}
	defer from.Close()
	if ready(from.Record) != k.Golden {
		return id, fmt.Errorf("%w: golden %s is another one by now", os.ErrNotExist, from.Record.Is())
	}
	return m.contents.cloneGolden(ctx, f, from, image.Thin)
}

// makeReady makes a volume ready from a template or golden that is there.
func (m *Manager) makeReady(ctx context.Context, k warm.Kind, spec diskfs.Spec) (_ *warm.Volume, err error) {
	f, err := m.images.New()
	if err != nil {
		return nil, err
	}
	v := &warm.Volume{File: f, Made: time.Now()}
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	if v.UUID, err = m.cloneKind(ctx, f, k); err != nil {
		return nil, err
	}
	if k.Form == warm.Unnamed {
		return v, tmpfile.Sync(f)
	}
	dev, err := m.devices.Ready(f, k.Form == warm.Volatile) // attaching syncs the image
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	if k.Form == warm.Volatile {
		v.Restore = func() error { return device.Restore(f, dev.Index()) }
	}
	v.Root, err = onDevice(dev, spec.Filesystem, image.Access{})
	return v, err
}

// Volumes are kept ready while this part of the node's memory is available, and this part of the
// pool is free beside its headroom.
const readyMemory, readySpace = 16, 64

// roomForReady returns an error while the node is short of memory, or the pool of space.
func (m *Manager) roomForReady() error {
	if err := m.pool.Check(); err != nil {
		return err
	}
	if err := m.space.CheckSpare(readySpace); err != nil {
		return err
	}
	available, total, err := meminfo.Available()
	if err == nil && available < total/readyMemory {
		err = fmt.Errorf("of the node's memory, %s of %s are available", size.Format(available), size.Format(total))
	}
	return err
}

// note writes to the templates what of them is worth keeping ready.
func (w warmth) note(wants []warm.Want) {
	levels := map[string]template.Demand{}
	for _, want := range wants {
		if want.Kind.Template == "" { // a golden's next generation is another kind
			continue
		}
		if levels[want.Kind.Template] == nil {
			levels[want.Kind.Template] = template.Demand{}
		}
		levels[want.Kind.Template][string(want.Kind.Form)] = want.Level
	}
	if err := w.templates.SetDemands(levels); err != nil {
		klog.ErrorS(err, "What is worth keeping ready cannot be noted; after a restart it is found out again")
	}
}

// recall reads what an earlier process noted. If the formatter has changed since, the same is
// worth keeping of the templates that it makes now.
func (w warmth) recall() (wants []warm.Want) {
	demands, err := w.templates.Demands()
	if err != nil {
		klog.ErrorS(err, "What was worth keeping ready cannot be read; it is found out again")
	}
	for key, demand := range demands {
		spec, err := w.templates.Describe(key)
		if err == nil {
			key, err = w.templates.KeyOf(spec)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			klog.ErrorS(err, "A template that volumes were kept ready of cannot be read", "template", key)
		}
		if err != nil {
			continue
		}
		for form, level := range demand {
			wants = append(wants, warm.Want{Kind: warm.Kind{Template: key, Form: warm.Form(form)}, Spec: spec, Level: level})
		}
	}
	return wants
}

// Warm lists what is kept ready, and how often it was asked for since the plugin started.
func (m *Manager) Warm() (shelves []warm.Shelf, taken map[warm.Form]warm.Taken) {
	return m.contents.warm.stock.Shelves()
}
