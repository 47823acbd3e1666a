// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/xattr"
)

// Attr is the extended attribute that holds an image's record, as JSON.
type Attr string

// The attributes. The package comment says why they are in different namespaces.
const (
	TemplateAttr Attr = "user.disktemplate"
	VolumeAttr   Attr = "trusted.disktemplate" // snapshots have it too
	// FrozenAttr marks a volume whose filesystem the plugin has frozen. A plugin that
	// finds the mark at its start died during the freeze: it thaws the filesystem.
	FrozenAttr Attr = "trusted.disktemplate.frozen"
	// WrittenAttr marks a volume whose filesystem was written out before it was unmounted. The kernel drops what it
	// cannot write while it unmounts, without an error.
	WrittenAttr Attr = "trusted.disktemplate.written"
	// StagedAttr holds the staging path of a block volume. Nothing is mounted at that
	// path, so without the attribute nobody could tell whether the volume is still wanted.
	StagedAttr Attr = "trusted.disktemplate.staged"
	// NoteAttr and VerifiedAttr are attributes of a template's lockfile: see [Pool.Note].
	NoteAttr     Attr = "trusted.disktemplate.note"
	VerifiedAttr Attr = "trusted.disktemplate.verified"
)

// ErrNoRecord means that an image has no record, or none that can be read.
var ErrNoRecord = errors.New("image has no valid record")

// maxRecord bounds a record, in bytes. The kernel's own limit is 64 KiB. xfs and btrfs
// store up to about 4 KiB cheaply.
const maxRecord = 16 << 10

// SetRecord writes v as the image's record.
func SetRecord(f *os.File, attr Attr, v any) error {
	b, err := encode(v)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", f.Name(), attr, err)
	}
	return Full(xattr.Set(f, string(attr), b))
}

// encode returns the attribute's value. It refuses a record that GetRecord could not read.
func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("the record has %d bytes, and at most %d are allowed; shorten the request", len(b), maxRecord)
	}
	return b, err
}

// RemoveRecord makes sure that the image does not have the attribute.
func RemoveRecord(f *os.File, attr Attr) error { return xattr.Remove(f, string(attr)) }

// GetRecord reads the image's record into v. It returns [ErrNoRecord] if there is
// no record, or if v cannot hold it.
func GetRecord(f *os.File, attr Attr, v any) error {
	b, err := xattr.Get(f, string(attr), maxRecord)
	return take(b, err, f.Name(), attr, v)
}

// ReadVolume is [GetRecord] for [VolumeAttr] of the volume with the given name. It does not
// open the image, and looks in the directory that was opened as the pool.
func (p *Pool) ReadVolume(name string, v any) error {
	return p.readRecord(filepath.Join(volumesDir, name), v)
}

// ReadSnapshot is [Pool.ReadVolume] for a snapshot.
func (p *Pool) ReadSnapshot(name string, v any) error {
	return p.readRecord(filepath.Join(snapshotsDir, name), v)
}

func (p *Pool) readRecord(name string, v any) error {
	b, err := xattr.GetAt(p.dir, name, string(VolumeAttr), maxRecord)
	return take(b, err, filepath.Join(p.root, name), VolumeAttr, v)
}

// take reads into v what reading an attribute has returned.
func take(b []byte, err error, path string, attr Attr, v any) error {
	if errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.ERANGE) {
		return fmt.Errorf("%w: %w", ErrNoRecord, err)
	}
	if err != nil { // the disk failed, which says nothing about the record
		return err
	}
	if err := decode(b, v); err != nil {
		return fmt.Errorf("%s: %s: %w", path, attr, err)
	}
	return nil
}

// decode reads into v what encode returned. Other text returns [ErrNoRecord].
func decode(b []byte, v any) error {
	err := json.Unmarshal(b, v)
	var kind *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &kind) && kind.Field != "":
		return fmt.Errorf("%w: its field %s is of another type: a %s", ErrNoRecord, kind.Field, kind.Value)
	}
	return fmt.Errorf("%w: it is not the JSON of one", ErrNoRecord)
}
