// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Goldens say which goldens a node has.
type Goldens struct {
	// Limits are asked for at each commit, since the pool may grow.
	Limits func() (golden.Limits, error)
	// CheckRead and CheckWrite tell whether a namespace may start from a shared golden, and commit to it. Their
	// errors are [errdefs.ErrInvalid].
	CheckRead, CheckWrite func(name, namespace string) error
}

// checkLineage checks the words of a request for goldens. field is what the request calls them.
func checkLineage(l image.Lineage, spec diskfs.Spec, mode image.Mode, readOnly bool, field string) error {
	sources, err := golden.Sources(l, field)
	if err != nil {
		return err
	}
	if len(sources) > 0 && spec.Content != "" {
		return fmt.Errorf("%w: %s content %.64q: does not go with from; set orElse to content/%.64s", errdefs.ErrInvalid, field, spec.Content, spec.Content)
	}
	if _, err := golden.Target(l, field); err != nil || l.CommitTo == "" {
		return err
	}
	if mode != image.ModeFilesystem {
		return fmt.Errorf("%w: %s commitTo %.80q: is for mounted filesystems, and this volume is published as %s", errdefs.ErrInvalid, field, l.CommitTo, mode)
	}
	if readOnly {
		return fmt.Errorf("%w: %s commitTo %.80q: the volume is read-only, so there is nothing to commit; leave one of both out", errdefs.ErrInvalid, field, l.CommitTo)
	}
	return nil
}

// start decides what a new volume of a namespace starts from: the first of its sources that is there, or else its
// content, or nothing. It completes the spec. from is nil if that is no golden; else the caller closes it.
//
// Errors are [errdefs.ErrInvalid], also for what the namespace may not use, [diskfs.ErrOutOfRange], and those of
// [Config].Content.
func (m *Manager) start(l image.Lineage, spec diskfs.Spec, mode image.Mode, namespace string) (_ diskfs.Spec, from *golden.Golden, err error) {
	if err := m.commits.check(l, namespace); err != nil {
		return spec, nil, err
	}
	sources, err := golden.Sources(l, "")
	if err != nil {
		return spec, nil, err
	}
	for _, s := range sources {
		if s.Kind == golden.Content {
			spec.Content = s.Name
			break
		}
		from, err := m.goldenOf(s, namespace)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue
		}
		if err == nil {
			spec, err = follow(spec, from)
		}
		return spec, from, err
	}
	if len(sources) > 0 && spec.Content == "" {
		spec, err = Content{}.files(spec)
		return spec, nil, err
	}
	spec, err = m.given(spec, mode, namespace)
	return spec, nil, err
}

// goldenOf opens the newest generation of a golden that a namespace wants to start from.
func (m *Manager) goldenOf(s golden.Source, namespace string) (*golden.Golden, error) {
	if err := m.commits.mayUse(s, namespace); err != nil {
		return nil, err
	}
	if s.Kind == golden.Shared {
		if err := m.commits.cfg.CheckRead(s.Name, namespace); err != nil {
			return nil, err
		}
	}
	return m.goldens.Newest(s.Golden(namespace))
}

// follow gives a volume what its golden decides, and closes the golden if the request asks for anything else.
func follow(asked diskfs.Spec, from *golden.Golden) (diskfs.Spec, error) {
	has := from.Record.Spec
	spec, err := followSpec(asked, has)
	if err != nil {
		from.Close()
		err = fmt.Errorf("golden %s: %w", from.Record.Is(), err)
	}
	return spec, err
}

func followSpec(asked, has diskfs.Spec) (diskfs.Spec, error) {
	const remedy = "ask for the same, or commit to a golden of another name"
	switch {
	case asked.IsDisk():
		return asked, fmt.Errorf("%w: it is a filesystem, and a disk is asked for; set the parameter format to %s", errdefs.ErrInvalid, has.Filesystem)
	case asked.Filesystem != "" && asked.Filesystem != has.Filesystem:
		return asked, fmt.Errorf("%w: it is %s, and %s is asked for; %s", errdefs.ErrInvalid, has.Filesystem, asked.Filesystem, remedy)
	case asked.Label != "" && asked.Label != has.Label:
		return asked, fmt.Errorf("%w: it has the label %q, and %q is asked for; %s", errdefs.ErrInvalid, has.Label, asked.Label, remedy)
	case len(asked.Options) > 0 && !(diskfs.Spec{Options: asked.Options}).Equal(diskfs.Spec{Options: has.Options}):
		return asked, fmt.Errorf("%w: it has other format options; %s", errdefs.ErrInvalid, remedy)
	case asked.Size > 0 && asked.Size < has.Size:
		return asked, fmt.Errorf("%w: it has %s, and %s is asked for; ask for at least that, or for no size", diskfs.ErrOutOfRange, size.Format(has.Size), size.Format(asked.Size))
	}
	has.Size = max(asked.Size, has.Size)
	return has, has.Validate()
}

// fillFromGolden gives an empty file the content of a golden, with an identity of its own. The rest of a larger
// volume is empty.
func (c contents) fillFromGolden(ctx context.Context, f *os.File, from *golden.Golden, r *image.Record) (err error) {
	r.UUID, err = c.cloneGolden(ctx, f, from, r.Provisioning)
	if err == nil {
		err = c.images.Extend(r.Provisioning, f, r.Spec.Size)
	}
	return err
}

func (c contents) cloneGolden(ctx context.Context, f *os.File, from *golden.Golden, p image.Provisioning) (uuid.UUID, error) {
	fs, err := diskfs.Lookup(from.Record.Spec.Filesystem)
	if err != nil {
		return uuid.UUID{}, err
	}
	if err := c.images.Fill(ctx, p, f, from.File, from.Record.Spec.Size); err != nil {
		return uuid.UUID{}, fmt.Errorf("from golden %s: %w", from.Record.Is(), err)
	}
	id := uuid.New()
	return id, fs.NewIdentity(from.File, f, id)
}

// growNew grows the filesystem of a new volume that is larger than its golden, where the kernel cannot do it once
// it is mounted.
func (m *Manager) growNew(ctx context.Context, vol open) error {
	r := vol.img.Record
	if r.Golden == "" || r.Mode != image.ModeFilesystem || vol.root != nil || fsctl.MayGrow(r.Spec.Filesystem) == nil || m.growth.tool == nil {
		return nil
	}
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if err != nil {
		return err
	}
	if grown, err := vol.img.Grown(); err != nil || grown {
		return err
	}
	return m.growth.onDevice(ctx, vol.img, fs)
}

// growStarted grows the mounted filesystem of a volume that is larger than its golden.
func growStarted(vol *open, access image.Access) error {
	r := vol.img.Record
	if r.Golden == "" || access.ReadOnly || fsctl.MayGrow(r.Spec.Filesystem) != nil {
		return nil
	}
	if grown, err := vol.img.Grown(); err != nil || grown {
		return err
	}
	return growMounted(vol.img, vol.root.File())
}
