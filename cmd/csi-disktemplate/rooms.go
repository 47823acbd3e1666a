// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/admin"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/content"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/driver"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/warm"
)

// rooms are those that a node's answers come from.
type rooms struct {
	pool      *pool.Pool
	volumes   *volume.Manager
	templates *template.Store
	goldens   *golden.Store
	plugin    *ownPlugin // nil in a command
}

// ownPlugin is what only a plugin has.
type ownPlugin struct {
	options   pluginOptions
	started   time.Time
	formatter *vmformat.Formatter
	builder   *builder
	metrics   *driver.Metrics
	look      *lookout
	unread    logs.Repeats // of goldens that cannot be read
}

// node joins the rooms. Without a plugin, what only that knows is nil.
func (r rooms) node() admin.Node {
	n := admin.Node{
		Volumes: r.listVolumes, Volume: r.volume, Templates: r.listTemplates, Template: r.template,
		Snapshots: r.listSnapshots, Snapshot: r.snapshot, Contents: r.listContents, Goldens: r.listGoldens,
	}
	if r.plugin != nil {
		n.Plugin, n.Status, n.Requests, n.Findings, n.Why = r.describePlugin, r.status, r.requests, r.findings, r.why
	}
	return n
}

func (r rooms) describePlugin() (admin.Plugin, error) {
	space, err := r.describePool()
	p := r.plugin
	accelerator, _, none := p.formatter.Accelerator() // that there is none is a finding
	if none != nil {
		accelerator = ""
	}
	return admin.Plugin{
		Version: versionName(), Driver: p.options.driverName, Node: p.options.nodeID,
		PID: os.Getpid(), Since: *admin.At(p.started),
		Accelerator: string(accelerator), KubeletDir: p.options.kubeletDir, Pool: space, Ending: r.volumes.Ending(),
	}, err
}

// status says of a pool that cannot be read what is wrong with it, if that is known.
func (r rooms) status() (s admin.Status, err error) {
	s.Plugin, err = r.describePlugin()
	ids, noList := r.pool.Volumes()
	s.Volumes, s.Findings = len(ids), append([]health.Finding{}, r.plugin.look.wrong()...)
	if slices.ContainsFunc(s.Findings, func(f health.Finding) bool { return f.Code == health.PoolUnusable }) {
		return s, nil
	}
	return s, errors.Join(err, noList)
}

func (r rooms) describePool() (admin.Pool, error) {
	space, err := r.pool.Space()
	if err != nil {
		return admin.Pool{}, err
	}
	promised, err := r.volumes.Account()
	if err != nil {
		return admin.Pool{}, err
	}
	layers, err := r.pool.Layers()
	is := admin.Pool{
		Path: r.pool.Root(), Kind: r.pool.Kind(), Size: space.Total, Available: space.Available,
		Headroom: promised.Headroom, Promised: promised.Promised, Left: promised.Left,
	}
	for _, l := range layers {
		is.Layers = append(is.Layers, admin.Layer{
			Path: l.Path, Type: l.Type.Name(), Size: l.Total, Available: l.Available, Shared: l.Shared,
		})
	}
	return is, err
}

func (r rooms) findings() ([]health.Finding, error) { return r.plugin.look.findings(), nil }

func (r rooms) requests() (admin.Requests, error) { return r.plugin.metrics.Requests(), nil }

func (r rooms) listVolumes() ([]admin.Volume, error) {
	listed, err := r.volumes.List()
	all := []admin.Volume{}
	for _, v := range listed {
		all = append(all, asVolume(v))
	}
	return all, err
}

func (r rooms) volume(id string) (admin.Volume, error) {
	listed, own, err := r.volumes.Describe(id)
	if err != nil {
		return admin.Volume{}, notFound(err)
	}
	v := asVolume(listed)
	v.Own = &own
	if r.plugin != nil {
		v.Requests = r.plugin.metrics.Requests().Of(func(c admin.Request) bool { return c.Object == id || c.Object == v.Claim })
	}
	return v, nil
}

// notFound makes an error of a room that of a node.
func notFound(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrInvalid) {
		return fmt.Errorf("%w: %w", admin.ErrNotFound, err)
	}
	return err
}

func asVolume(v volume.Listed) admin.Volume {
	is := admin.Volume{
		ID: v.ID, Lifecycle: v.Lifecycle.String(), State: stateOf(v), Claim: v.Name,
		Filesystem: v.Spec.Filesystem, Mode: string(v.Mode), Size: v.Spec.Size, Used: v.Used, Allocated: v.Allocated,
		Content: v.Spec.Content, Label: v.Spec.Label, Options: v.Spec.Options,
		UUID: textOf(v.UUID), Created: *admin.At(v.Created),
		Template: v.Template, Golden: v.Golden, From: v.From, OrElse: v.OrElse, CommitTo: v.CommitTo, CommitWhen: string(v.CommitWhen),
		Warm: v.WasReady, Durability: string(v.Durability),
		PublishedAt: v.Published, StagedAt: v.Staged, Conditions: admin.Conditions(v.Conditions),
	}
	if v.Access != (image.Access{}) {
		is.Access = v.Access.String()
	}
	if v.Pod != (image.Pod{}) {
		is.Pod = &admin.Pod{Namespace: v.Pod.Namespace, Name: v.Pod.Name, UID: v.Pod.UID}
	}
	if v.Source != (image.Source{}) {
		is.Source = v.Source.String()
	}
	if v.Lifecycle == image.Claim {
		is.Provisioning = v.Provisioning.String()
	}
	for _, index := range v.Loops {
		is.Devices = append(is.Devices, "/dev/loop"+strconv.Itoa(index))
	}
	return is
}

func textOf(id uuid.UUID) string {
	if id == uuid.Nil {
		return ""
	}
	return id.String()
}

func stateOf(v volume.Listed) admin.State {
	switch {
	case v.Phase == volume.IsKept:
		return admin.Kept
	case v.Phase == volume.IsEnding:
		return admin.Ending
	case len(v.Published) > 0:
		return admin.Published
	case len(v.Staged) > 0:
		return admin.Staged
	case len(v.Loops) > 0:
		return admin.Attached
	}
	return admin.Idle
}

// listTemplates lists the templates that are there, and those that are being built or could not be.
func (r rooms) listTemplates() ([]admin.Template, error) {
	cached, err := r.templates.List()
	if err != nil {
		return nil, err
	}
	all := []admin.Template{}
	for _, t := range cached {
		all = append(all, admin.Template{
			Key: t.Key, State: admin.There, Filesystem: t.Filesystem, Size: t.Size, Content: t.Content,
			Takes: t.Takes, Frees: t.Frees, Extents: t.Extents, Used: admin.At(t.Used), Holder: t.Holder,
		})
	}
	if r.plugin == nil {
		return all, nil
	}
	for _, b := range r.builds() {
		if i := slices.IndexFunc(all, func(t admin.Template) bool { return t.Key == b.Key }); i >= 0 {
			all[i].State, all[i].Since, all[i].Reason, all[i].Percent = b.State, b.Since, b.Reason, b.Percent
		} else {
			all = append(all, b)
		}
	}
	ready := r.ready()
	for i := range all {
		all[i].Ready = ready[warm.Kind{Template: all[i].Key}]
	}
	slices.SortFunc(all, func(a, b admin.Template) int { return cmp.Compare(a.Key, b.Key) })
	return all, nil
}

// ready is what is kept ready, by kind without the form.
func (r rooms) ready() map[warm.Kind][]admin.Ready {
	all := map[warm.Kind][]admin.Ready{}
	shelves, _ := r.volumes.Warm()
	slices.SortFunc(shelves, func(a, b warm.Shelf) int { return cmp.Compare(a.Kind.Form, b.Kind.Form) })
	for _, s := range shelves {
		of := warm.Kind{Template: s.Kind.Template, Golden: s.Kind.Golden}
		all[of] = append(all[of], admin.Ready{Form: string(s.Kind.Form), Ready: s.Ready, Level: s.Level})
	}
	return all
}

// template is one template, with how it was made.
func (r rooms) template(key string) (admin.Template, error) {
	all, err := r.listTemplates()
	if err != nil {
		return admin.Template{}, err
	}
	i := slices.IndexFunc(all, func(t admin.Template) bool { return t.Key == key })
	if i < 0 {
		return admin.Template{}, fmt.Errorf("%w: there is no template %.80s on this node", admin.ErrNotFound, key)
	}
	made, err := r.templates.Record(key)
	if errors.Is(err, template.ErrCorrupt) || errors.Is(err, os.ErrNotExist) { // it is not there yet, or is made anew
		return all[i], nil
	}
	all[i].Made = &admin.Made{
		Label: made.Spec.Label, Options: made.Spec.Options, UUID: made.Provenance.UUID, Built: *admin.At(made.Built),
		Took: float64(made.BuildMS) / 1000, Kernel: made.Provenance.Kernel, Mkfs: made.Provenance.Mkfs,
		Accelerator: made.Provenance.Accelerator, Digest: made.Digest, Content: made.Provenance.Content,
	}
	return all[i], err
}

// builds are the templates that are being built, or could not be.
func (r rooms) builds() (all []admin.Template) {
	for _, b := range r.templates.Builds() {
		t := admin.Template{
			Key: b.Key, State: admin.Building, Filesystem: b.Spec.Filesystem, Size: b.Spec.Size, Content: b.Spec.Content,
			Since: admin.At(b.Since), Reason: b.What, Percent: r.plugin.builder.percent(b.Spec),
		}
		if b.Err != nil {
			t.State, t.Reason = admin.Failed, b.Err.Error()
		}
		all = append(all, t)
	}
	return all
}

// percent is how much of the content of a build is unpacked; nil if that is unknown.
func (b *builder) percent(spec diskfs.Spec) *int {
	b.mu.Lock()
	defer b.mu.Unlock()
	of := b.under[spec.String()]
	if of.total <= 0 {
		return nil
	}
	percent := int(100 * of.done / of.total)
	return &percent
}

func (r rooms) listSnapshots() ([]admin.Snapshot, error) {
	records, _, err := r.volumes.ListSnapshots("", "", 0)
	all := []admin.Snapshot{}
	for _, s := range records {
		st, err := r.pool.StatSnapshot(s.ID)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		all = append(all, asSnapshot(s, st.Allocated))
	}
	return all, err
}

func asSnapshot(s image.SnapshotRecord, allocated int64) admin.Snapshot {
	return admin.Snapshot{
		ID: s.ID, Name: s.Name, Volume: s.Volume, Filesystem: s.Spec.Filesystem, Mode: string(s.Mode), Size: s.Spec.Size,
		Allocated: allocated, UUID: textOf(s.UUID), Created: *admin.At(s.Created),
	}
}

func (r rooms) snapshot(id string) (admin.Snapshot, error) {
	if err := image.CheckID(id); err != nil {
		return admin.Snapshot{}, notFound(err)
	}
	snap, err := image.NewStore(r.pool).OpenSnapshot(id)
	if err != nil {
		return admin.Snapshot{}, notFound(err)
	}
	defer snap.Close()
	allocated, err := image.Allocated(snap.File)
	if err != nil {
		return admin.Snapshot{}, err
	}
	own, err := fiemap.Unshared(snap.File)
	s, own := asSnapshot(snap.Record, allocated), min(own, allocated)
	s.Own = &own
	return s, err
}

// listContents lists the contents of the operator. Without a plugin nobody knows its list, and what is known are
// the contents that templates were built with.
func (r rooms) listContents() ([]admin.Content, error) {
	cached, err := r.templates.List()
	if err != nil {
		return nil, err
	}
	all := []admin.Content{}
	if r.plugin != nil && r.plugin.builder.list != nil {
		for _, d := range r.plugin.builder.list.Describe() {
			all = append(all, asContent(d))
		}
	}
	for _, t := range cached {
		i := slices.IndexFunc(all, func(c admin.Content) bool { return c.Name == t.Content })
		switch {
		case i >= 0:
			all[i].Templates = append(all[i].Templates, t.Key)
		case t.Content != "" && r.plugin == nil:
			all = append(all, admin.Content{Name: t.Content, Templates: []string{t.Key}})
		}
	}
	return all, nil
}

func asContent(d content.Described) admin.Content {
	c := admin.Content{
		Name: d.Name, State: admin.Known, Kind: string(d.Kind), Source: cmp.Or(d.Reference, d.File), Namespaces: d.Namespaces,
		Size: d.Size, Digest: d.Digest,
	}
	switch {
	case d.Err == nil:
	case errors.Is(d.Err, content.ErrResolving):
		c.State = admin.Resolving
	default:
		c.Reason = d.Err.Error()
		if d.Digest == "" {
			c.State = admin.Unavailable
		}
	}
	return c
}

func (r rooms) listGoldens() ([]admin.Golden, error) {
	described, err := r.goldens.DescribeAll()
	all := []admin.Golden{}
	ready := r.ready()
	for _, d := range described {
		g := asGolden(d)
		g.Ready = ready[warm.Kind{Golden: d.Generation.String()}]
		all = append(all, g)
	}
	if err != nil && len(all) > 0 && r.plugin != nil { // an answer has either
		if show, _ := r.plugin.unread.Failed("goldens", "read"); show {
			logs.Warn("Some goldens cannot be read; a list leaves them out", "err", err)
		}
		err = nil
	}
	return all, err
}

func asGolden(d golden.Described) admin.Golden {
	r := d.Record
	return admin.Golden{
		Namespace: r.Namespace, Name: r.Name, Generation: r.Generation,
		Filesystem: r.Spec.Filesystem, Size: r.Spec.Size, Label: r.Spec.Label, Options: r.Spec.Options, UUID: r.UUID.String(),
		Used: d.Bytes, Own: d.Own, Shared: d.Shared(),
		Created: *admin.At(r.Created), LastUse: *admin.At(d.Used), By: r.By, Volume: r.Volume,
	}
}

// why says what a pod's volumes wait for.
func (r rooms) why(asked string) (admin.Why, error) {
	volumes, err := r.listVolumes()
	if err != nil {
		return admin.Why{}, err
	}
	return admin.Explain(asked, admin.Seen{
		Requests: r.plugin.metrics.Requests(), Volumes: volumes, Templates: r.builds(), Findings: r.plugin.look.wrong(),
	}), nil
}
