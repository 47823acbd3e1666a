// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
)

// Attr is the extended attribute that holds an image's record, as JSON.
type Attr string

// The attributes. See the package's comment for why they differ.
const (
	TemplateAttr Attr = "user.disktemplate"
	VolumeAttr   Attr = "trusted.disktemplate" // of snapshots too
	// FrozenAttr marks a volume whose filesystem its plugin has frozen. A plugin
	// that finds it at its start has died meanwhile, and thaws.
	FrozenAttr Attr = "trusted.disktemplate.frozen"
	// StagedAttr is the staging path of a block volume. Nothing is mounted there, so
	// that nothing else would tell whether the volume is still wanted.
	StagedAttr Attr = "trusted.disktemplate.staged"
)

// ErrNoRecord means that an image has no record, or none that can be read.
var ErrNoRecord = errors.New("image has no valid record")

// maxRecord bounds a record. The kernel's own limit is 64 KiB; xfs and btrfs keep
// up to about 4 KiB cheaply.
const maxRecord = 16 << 10

// SetRecord writes v as the image's record.
func SetRecord(f *os.File, attr Attr, v any) error {
	b, err := encode(v)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", f.Name(), attr, err)
	}
	if err = failpoint.Before("fsetxattr"); err == nil {
		err = unix.Fsetxattr(int(f.Fd()), string(attr), b, 0)
	}
	if err != nil {
		return full(&os.PathError{Op: "fsetxattr " + string(attr), Path: f.Name(), Err: err})
	}
	return nil
}

// encode is what stands in an attribute. What could not be read again is refused.
func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err == nil && len(b) > maxRecord {
		err = fmt.Errorf("the record would have %d bytes, at most %d are allowed: shorten what was asked for", len(b), maxRecord)
	}
	return b, err
}

// RemoveRecord takes an attribute away. One that is not there is fine.
func RemoveRecord(f *os.File, attr Attr) error {
	err := failpoint.Before("fremovexattr")
	if err == nil {
		err = unix.Fremovexattr(int(f.Fd()), string(attr))
	}
	if err != nil && err != unix.ENODATA {
		return &os.PathError{Op: "fremovexattr " + string(attr), Path: f.Name(), Err: err}
	}
	return nil
}

// GetRecord reads the image's record into v. It is [ErrNoRecord] if there is
// none, or not of this form.
func GetRecord(f *os.File, attr Attr, v any) error {
	b := make([]byte, maxRecord)
	n, err := unix.Fgetxattr(int(f.Fd()), string(attr), b)
	if err != nil && err != unix.ENODATA && err != unix.ERANGE { // a disk that cannot be read says nothing
		return &os.PathError{Op: "fgetxattr " + string(attr), Path: f.Name(), Err: err}
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %s: %w", ErrNoRecord, f.Name(), attr, err)
	}
	if err := decode(b[:n], v); err != nil {
		return fmt.Errorf("%s: %s: %w", f.Name(), attr, err)
	}
	return nil
}

// decode reads what encode made into v, or is [ErrNoRecord].
func decode(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", ErrNoRecord, err)
	}
	return nil
}
