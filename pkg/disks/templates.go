// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package disks

import (
	"context"
	"errors"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat"
)

// Templates joins a cache and a formatter: a store of templates without contents. The caller closes
// it.
func Templates(cache *pool.Pool, f *vmformat.Formatter) *template.Store {
	return template.NewStore(template.Config{
		Pool:        cache,
		Fingerprint: func(spec diskfs.Spec) (string, error) { return f.Fingerprint(spec, nil) },
		Format: func(ctx context.Context, file *os.File, spec diskfs.Spec) (template.Provenance, error) {
			r, err := f.Format(ctx, file, spec, nil, nil)
			if errors.Is(err, vmformat.ErrUnavailable) {
				err = template.NoFormatter(err)
			}
			return template.Provenance{
				Fingerprint: r.Fingerprint, UUID: r.UUID, Kernel: r.Kernel, Mkfs: r.Mkfs, Accelerator: string(r.Accelerator),
			}, err
		},
	})
}
