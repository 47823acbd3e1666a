// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/meminfo"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
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
func (w warmth) kind(r image.Record) (k warm.Kind, fits bool) {
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
	if v != nil {
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

// makeReady makes a volume ready from a template that is there.
func (m *Manager) makeReady(ctx context.Context, k warm.Kind, spec diskfs.Spec) (_ *warm.Volume, err error) {
	t, err := m.contents.templates.Lookup(k.Template)
	if err != nil {
		return nil, err
	}
	defer t.Close()
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
	if v.UUID, err = m.contents.clone(ctx, f, t, image.Thin); err != nil {
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
