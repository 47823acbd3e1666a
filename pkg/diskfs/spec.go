// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"fmt"
	"maps"
	"regexp"
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
	// Content names what is inside from the start, among the contents of the operator. Empty means nothing.
	Content string `json:"content,omitempty"`
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
	if err := CheckContent(s.Content); err != nil {
		return err
	}
	return fs.CheckOptions(s.Options)
}

// maxContent is the longest name of a content, in bytes: that of a label in RFC 1123.
const maxContent = 63

var contentPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

// CheckContent returns [ErrInvalid] for a text that cannot be the name of a content. The empty name means none.
func CheckContent(name string) error {
	if name == "" || len(name) <= maxContent && contentPattern.MatchString(name) {
		return nil
	}
	return fmt.Errorf("%w: content %.64q: a name has lower case letters, digits and '-', begins and ends with a letter or digit, "+
		"and has at most %d characters", ErrInvalid, name, maxContent)
}

// IsDisk reports whether the spec is that of a whole disk: its consumer decides what is inside, or its content.
func (s Spec) IsDisk() bool { return s.Filesystem == Disk }

// ParseSpec reads a spec as flags and lists of templates spell it: FILESYSTEM:SIZE, and behind it any of
// :label=LABEL, :content=NAME and :OPTION=VALUE. The filesystem must be one that is formatted, and the size is
// rounded up to whole MiB. A content that is a whole disk is spelled raw:content=NAME, since it decides its size.
// Errors are those of [Spec.Validate] and [Filesystem.ParseSize]. They do not repeat the whole text.
func ParseSpec(text string) (Spec, error) {
	if name, ok := strings.CutPrefix(text, Disk+":content="); ok && name != "" {
		return Spec{Filesystem: Disk, Content: name}, CheckContent(name)
	}
	parts := strings.Split(text, ":")
	if len(parts) < 2 {
		return Spec{}, fmt.Errorf("%w: must be FILESYSTEM:SIZE, as xfs:10Gi, and may have options behind it, "+
			"as ext4:1Gi:inode-size=512:label=data", ErrInvalid)
	}
	fs, err := Lookup(parts[0])
	if err != nil || !fs.Formatted() {
		return Spec{}, fmt.Errorf("%w %.64q: must be one of %s", ErrUnknown, parts[0], strings.Join(Names(), ", "))
	}
	spec := Spec{Filesystem: fs.Name}
	if spec.Size, err = fs.ParseSize(parts[1]); err != nil {
		return Spec{}, fmt.Errorf("size %.32q: %w", parts[1], err)
	}
	if err := spec.parseOptions(parts[2:]); err != nil {
		return Spec{}, err
	}
	return spec, spec.Validate()
}

// parseOptions reads label=LABEL, content=NAME and OPTION=VALUE, each name once.
func (s *Spec) parseOptions(options []string) error {
	values := map[string]string{}
	for _, o := range options {
		name, value, ok := strings.Cut(o, "=")
		if _, twice := values[name]; !ok || name == "" || twice {
			return fmt.Errorf("%w: option %.64q: must be NAME=VALUE, each name once", ErrInvalid, o)
		}
		values[name] = value
	}
	s.Label, s.Content = values["label"], values["content"]
	delete(values, "label")
	delete(values, "content")
	if len(values) > 0 {
		s.Options = values
	}
	return nil
}

// Equal reports whether two specs describe the same content.
func (s Spec) Equal(o Spec) bool {
	return s.Filesystem == o.Filesystem && s.Size == o.Size && s.Label == o.Label && s.Content == o.Content &&
		maps.Equal(s.Options, o.Options)
}

// String returns the spec as messages show it: "ext4 256Mi label=data inode-size=512".
func (s Spec) String() string {
	var b strings.Builder
	b.WriteString(s.Filesystem)
	if s.Size > 0 {
		fmt.Fprintf(&b, " %s", size.Format(s.Size))
	}
	if s.Content != "" {
		fmt.Fprintf(&b, " content=%s", s.Content)
	}
	if s.Label != "" {
		fmt.Fprintf(&b, " label=%s", s.Label)
	}
	for _, k := range slices.Sorted(maps.Keys(s.Options)) {
		fmt.Fprintf(&b, " %s=%s", k, s.Options[k])
	}
	return b.String()
}
