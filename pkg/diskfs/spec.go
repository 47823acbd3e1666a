// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// Spec says what an image contains. It is plain data. [Spec.Equal] compares two of them.
type Spec struct {
	Filesystem string            `json:"filesystem"`
	Size       int64             `json:"size"` // bytes, whole MiB
	Label      string            `json:"label,omitempty"`
	Options    map[string]string `json:"options,omitempty"` // format options from the filesystem's allow-list
}

// Validate checks every field against the filesystem's limits. Errors are [ErrUnknown],
// [ErrOutOfRange] or [ErrInvalid].
func (s Spec) Validate() error {
	fs, err := Lookup(s.Filesystem)
	if err != nil {
		return err
	}
	if err := fs.checkSize(s.Size); err != nil {
		return err
	}
	if s.Size%MiB != 0 {
		return fmt.Errorf("%w: a size of %d bytes is not a whole number of Mi; round it up to %s", ErrInvalid, s.Size, size.Format(RoundUp(s.Size)))
	}
	if err := fs.CheckLabel(s.Label); err != nil {
		return err
	}
	return fs.CheckOptions(s.Options)
}

// Equal reports whether two specs describe the same content.
func (s Spec) Equal(o Spec) bool {
	return s.Filesystem == o.Filesystem && s.Size == o.Size && s.Label == o.Label && maps.Equal(s.Options, o.Options)
}

// String returns the spec as messages show it: "ext4 256Mi label=data inode-size=512".
func (s Spec) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", s.Filesystem, size.Format(s.Size))
	if s.Label != "" {
		fmt.Fprintf(&b, " label=%s", s.Label)
	}
	for _, k := range slices.Sorted(maps.Keys(s.Options)) {
		fmt.Fprintf(&b, " %s=%s", k, s.Options[k])
	}
	return b.String()
}
