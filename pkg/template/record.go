// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// ErrCorrupt means that a file in the pool is not the template that its name says.
var ErrCorrupt = errors.New("template is corrupt")

// recordVersion is the version of [Record]'s format that this package writes.
const recordVersion = 1

// Record says how a template was made. It is kept as JSON in the image's
// attribute user.disktemplate.
type Record struct {
	Version    int         `json:"version"`
	Key        string      `json:"key"`
	Spec       diskfs.Spec `json:"spec"`
	Provenance Provenance  `json:"provenance"`
	Digest     string      `json:"digest"` // see digest in digest.go
	Built      time.Time   `json:"built"`
	BuildMS    int64       `json:"buildMillis"`
}

// Provenance is the formatter's account of its work.
type Provenance struct {
	Fingerprint string `json:"fingerprint"` // of the files that were really used
	UUID        string `json:"uuid"`
	Kernel      string `json:"kernel"` // release of the kernel that checked it
	Mkfs        string `json:"mkfs"`   // version line
	Accelerator string `json:"accelerator"`
	Content     string `json:"content,omitempty"` // digest of spec's content, as it was then
}

// Template is an open template. The caller closes it.
type Template struct {
	*os.File
	Record
	Bytes int64 // size of the image
	// Hit reports whether the template was there before the call.
	Hit   bool
	letGo func()
}

// Close closes the file. From then on the template may be trimmed.
func (t *Template) Close() error {
	t.letGo()
	return t.File.Close()
}

// readRecord reads the record of an open image, and checks that it is one of a key and of a file of
// that size. It reads no content.
func readRecord(f *os.File, key string) (Record, *diskfs.Filesystem, error) {
	var r Record
	if err := pool.GetRecord(f, pool.TemplateAttr, &r); errors.Is(err, pool.ErrNoRecord) {
		return r, nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	} else if err != nil {
		return r, nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return r, nil, err
	}
	fs, err := r.fits(key, fi.Size())
	if err != nil {
		return r, nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return r, fs, nil
}

// verify checks that an open image is the template of a key: its record, its size, its
// superblocks, and the digest of all its data.
func verify(f *os.File, key string) (Record, error) {
	r, fs, err := readRecord(f, key)
	if err != nil {
		return r, err
	}
	if fs.Formatted() {
		if err := verifyFilesystem(f, fs, r); err != nil {
			return r, err
		}
	}
	sum, err := digest(f)
	if err != nil {
		return r, err
	}
	if sum != r.Digest {
		return r, fmt.Errorf("%w: its data has the digest %s, its record says %s", ErrCorrupt, sum, r.Digest)
	}
	return r, nil
}

// verifyFilesystem checks the superblocks of an image.
func verifyFilesystem(f *os.File, fs *diskfs.Filesystem, r Record) error {
	sb, err := fs.Verify(f, r.Spec.Size, r.Spec.Label)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err != nil { // a failed read does not make the template corrupt
		return err
	}
	if sb.UUID.String() != r.Provenance.UUID {
		return fmt.Errorf("%w: its filesystem has the UUID %s, its record says %s", ErrCorrupt, sb.UUID, r.Provenance.UUID)
	}
	return nil
}

// fits checks that a record belongs to a key and to a file of this size. It returns the
// filesystem that should be inside.
func (r Record) fits(key string, bytes int64) (*diskfs.Filesystem, error) {
	switch {
	case r.Version != recordVersion:
		return nil, fmt.Errorf("its record has version %d, this plugin can read version %d", r.Version, recordVersion)
	case r.Key != key:
		return nil, fmt.Errorf("its record is of %q", r.Key)
	case key != Key(r.Spec, r.Provenance.Fingerprint):
		return nil, fmt.Errorf("its record is of %q, but describes the content of %q", r.Key, Key(r.Spec, r.Provenance.Fingerprint))
	case bytes != r.Spec.Size && !r.Spec.IsDisk(): // a disk's content decides its size
		return nil, fmt.Errorf("it has %d bytes, its record says %s (%d bytes)", bytes, size.Format(r.Spec.Size), r.Spec.Size)
	}
	return diskfs.Lookup(r.Spec.Filesystem)
}
