// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// TestMountFlags checks that the table has one row for each field of Access that is a bool, and for
// each of mount.Attr, and that each row means the same in all its forms.
func TestMountFlags(t *testing.T) {
	bools := 0
	for f := range reflect.TypeFor[Access]().Fields() {
		if f.Type.Kind() == reflect.Bool {
			bools++
		}
	}
	if len(mountFlags) != bools || bools != reflect.TypeFor[mount.Attr]().NumField() {
		t.Fatalf("%d rows, %d bools in Access, %d fields of mount.Attr", len(mountFlags), bools, reflect.TypeFor[mount.Attr]().NumField())
	}
	fields, attrs := map[*bool]string{}, map[*bool]string{}
	var a Access
	var m mount.Attr
	for _, f := range mountFlags {
		field, attr := f.field(&a), f.attr(&m)
		if fields[field] != "" || attrs[attr] != "" {
			t.Errorf("%s has the field or the attribute of %s%s", f.on, fields[field], attrs[attr])
		}
		fields[field], attrs[attr] = f.on, f.on
		for _, word := range strings.Fields(f.inline) {
			if word != f.on && word != f.off {
				t.Errorf("%s: an inline volume may have %q, which is another flag", f.on, word)
			}
		}
		for _, word := range []string{f.on, f.off} {
			got, err := ParseMountFlags([]string{word}, Claim)
			if err != nil || *f.field(&got) != (word == f.on) {
				t.Errorf("%s is read as %s: %v", word, got, err)
			}
			if !slices.Contains(strings.Split(got.String(), ","), word) || AccessOf(&mount.Info{Attr: got.Attr()}) != got {
				t.Errorf("%s is written as %s, and its mount is read as %s", word, got, AccessOf(&mount.Info{Attr: got.Attr()}))
			}
			attr := got.Attr()
			if *f.attr(&attr) != ((word == f.on) != f.negated) {
				t.Errorf("%s is mounted as %+v", word, attr)
			}
			_, err = ParseMountFlags([]string{word}, Inline)
			if allowed := slices.Contains(MountFlags(Inline), word); allowed != (err == nil) {
				t.Errorf("%s of an inline volume: %v", word, err)
			}
		}
	}
	// The author of a pod must not be able to make set-user-ID programs or devices take effect.
	for _, word := range []string{"suid", "dev"} {
		if _, err := ParseMountFlags([]string{word}, Inline); err == nil {
			t.Errorf("an inline volume may have %s", word)
		}
	}
	if usual := (Access{}).Attr(); !usual.NoSUID || !usual.NoDev || usual.ReadOnly || usual.NoExec {
		t.Errorf("the usual access is %+v", usual)
	}
}
