// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"slices"
	"strings"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Access is what a mount of a volume allows. The zero value is the usual one: writable, and
// without effect for set-user-ID programs and device nodes, since a pod may write any data.
type Access struct {
	ReadOnly bool `json:"readOnly,omitempty"`
	NoATime  bool `json:"noATime,omitempty"`
	NoExec   bool `json:"noExec,omitempty"`
	SUID     bool `json:"suid,omitempty"` // set-user-ID programs take effect
	Dev      bool `json:"dev,omitempty"`  // device nodes take effect
	// Context is the SELinux context of all files; "" leaves each file its own. It is an option of
	// the filesystem, so all its mounts have the same.
	Context string `json:"context,omitempty"`
}

// mountFlag is a mount option, in every form in which the plugin meets it.
type mountFlag struct {
	on, off string // the option and its opposite, as mount(8) spells them
	inline  string // which of the two an inline volume may have, separated by a space
	field   func(*Access) *bool
	attr    func(*mount.Attr) *bool
	negated bool // the attribute is set where the field is not
}

// mountFlags has one row for each field of [Access] that is a bool; a test checks that. The author
// of a pod chooses the flags of its inline volumes, an administrator those of a StorageClass.
var mountFlags = []mountFlag{
	{"ro", "rw", "ro rw", func(a *Access) *bool { return &a.ReadOnly }, func(m *mount.Attr) *bool { return &m.ReadOnly }, false},
	{"suid", "nosuid", "nosuid", func(a *Access) *bool { return &a.SUID }, func(m *mount.Attr) *bool { return &m.NoSUID }, true},
	{"dev", "nodev", "nodev", func(a *Access) *bool { return &a.Dev }, func(m *mount.Attr) *bool { return &m.NoDev }, true},
	{"noexec", "exec", "", func(a *Access) *bool { return &a.NoExec }, func(m *mount.Attr) *bool { return &m.NoExec }, false},
	{"noatime", "relatime", "noatime relatime", func(a *Access) *bool { return &a.NoATime }, func(m *mount.Attr) *bool { return &m.NoATime }, false},
}

// MountFlags lists the mount options that a volume may have.
func MountFlags(of Lifecycle) []string {
	var words []string
	for _, f := range mountFlags {
		if of == Inline {
			words = append(words, strings.Fields(f.inline)...)
		} else {
			words = append(words, f.on, f.off)
		}
	}
	return words
}

// ParseMountFlags reads mount options as mount(8) does: if two contradict each other, the
// last one counts. An option that the volume may not have returns [errdefs.ErrInvalid].
func ParseMountFlags(given []string, of Lifecycle) (a Access, err error) {
	allowed := MountFlags(of)
	for _, word := range given {
		if value, ok := strings.CutPrefix(word, contextKey); ok {
			if a.Context, err = parseContext(value); err != nil {
				return Access{}, err
			}
			continue
		}
		if !slices.Contains(allowed, word) {
			return Access{}, unsupported(word, allowed)
		}
		for _, f := range mountFlags {
			if word == f.on || word == f.off {
				*f.field(&a) = word == f.on
			}
		}
	}
	return a, nil
}

// unsupported is the error for a mount option that a volume may not have.
func unsupported(word string, allowed []string) error {
	why := "is not supported"
	if slices.ContainsFunc(otherContexts, func(key string) bool { return strings.HasPrefix(word, key) }) {
		why += "; of SELinux's options, only " + contextKey + " is"
	}
	return fmt.Errorf("%w: mount option %.64q (in mountOptions): %s; allowed are %s and %s",
		errdefs.ErrInvalid, word, why, strings.Join(allowed, ", "), contextKey)
}

// Data is the access as options of a filesystem, which all its mounts share.
func (a Access) Data() []string {
	if a.Context == "" {
		return nil
	}
	return []string{contextKey + a.Context}
}

// Attr is the access as attributes of a mount.
func (a Access) Attr() mount.Attr {
	var attr mount.Attr
	for _, f := range mountFlags {
		*f.attr(&attr) = *f.field(&a) != f.negated
	}
	return attr
}

// String lists the options as mount(8) does.
func (a Access) String() string {
	var words []string
	for _, f := range mountFlags {
		if *f.field(&a) {
			words = append(words, f.on)
		} else {
			words = append(words, f.off)
		}
	}
	if a.Context != "" {
		words = append(words, fmt.Sprintf("%s%q", contextKey, a.Context))
	}
	return strings.Join(words, ",")
}

// AccessOf is the access that a mount allows.
func AccessOf(info *mount.Info) Access {
	a := Access{Context: contextOf(info.Options)}
	for _, f := range mountFlags {
		*f.field(&a) = *f.attr(&info.Attr) != f.negated
	}
	return a
}
