// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

func TestParseSpec(t *testing.T) {
	for text, want := range map[string]string{
		"xfs:10Gi":                             "xfs 10Gi",
		"ext4:1500M":                           "ext4 1431Mi",
		"ext4:1Gi:inode-size=512":              "ext4 1Gi inode-size=512",
		"ext4:1Gi:journal=off:label=data":      "ext4 1Gi label=data journal=off",
		"btrfs:4294967295Mi:nodesize=16384":    "btrfs 4294967295Mi nodesize=16384",
		"xfs:300Mi:label=a.b_c-d:rmapbt=1":     "xfs 300Mi label=a.b_c-d rmapbt=1",
		"ext4:1Gi:label=inode-size:journal=on": "ext4 1Gi label=inode-size journal=on",
		"ext4:1Gi:label=l:content=postgres-16": "ext4 1Gi content=postgres-16 label=l",
		"raw:content=fedora":                   "raw content=fedora",
	} {
		if spec, err := ParseSpec(text); err != nil || spec.String() != want {
			t.Errorf("%s is read as %s: %v", text, spec, err)
		}
	}
}

func TestParseSpecRefuses(t *testing.T) {
	for text, c := range map[string]struct {
		is   error
		says []string
	}{
		"":                                 {ErrInvalid, []string{"FILESYSTEM:SIZE", "xfs:10Gi"}},
		"xfs":                              {ErrInvalid, []string{"FILESYSTEM:SIZE"}},
		":1Gi":                             {ErrUnknown, []string{`""`, "btrfs, ext4, xfs"}},
		"raw:1Gi":                          {ErrUnknown, []string{`"raw"`, "btrfs, ext4, xfs"}},
		"XFS:1Gi":                          {ErrUnknown, []string{`"XFS"`, "btrfs, ext4, xfs"}},
		"raw:content=":                     {ErrUnknown, []string{`"raw"`, "btrfs, ext4, xfs"}},
		"raw:content=Fedora":               {ErrInvalid, []string{`content "Fedora"`, "lower case letters"}},
		"xfs:1Gi:content=a/b":              {ErrInvalid, []string{`content "a/b"`, "lower case letters"}},
		"xfs:":                             {size.ErrInvalid, []string{`size ""`, "10Gi"}},
		"xfs:big":                          {size.ErrInvalid, []string{`size "big"`, "10Gi"}},
		"xfs:10GB":                         {size.ErrInvalid, []string{`size "10GB"`, "did you mean 10G"}},
		"xfs:299Mi":                        {ErrOutOfRange, []string{"300Mi"}},
		"xfs:-1Gi":                         {ErrOutOfRange, []string{`"-1Gi"`, "300Mi"}},
		"ext4:1e30":                        {ErrOutOfRange, []string{"8Ti"}},
		"ext4:1e999999999":                 {size.ErrInvalid, []string{"10Gi"}},
		"ext4:18446744074783293440":        {ErrOutOfRange, []string{"8Ti"}},
		"xfs:10Gi ":                        {size.ErrInvalid, []string{`"10Gi "`}},
		"xfs:10Gi,ext4:1Gi":                {size.ErrInvalid, []string{`"10Gi,ext4"`}},
		"ext4:1Gi:":                        {ErrInvalid, []string{`option ""`, "NAME=VALUE"}},
		"ext4:1Gi:journal":                 {ErrInvalid, []string{`option "journal"`, "NAME=VALUE"}},
		"ext4:1Gi:=off":                    {ErrInvalid, []string{"NAME=VALUE"}},
		"ext4:1Gi:journal=off:journal=off": {ErrInvalid, []string{"each name once"}},
		"ext4:1Gi:label=a:label=b":         {ErrInvalid, []string{"each name once"}},
		"ext4:1Gi:journal=maybe":           {ErrInvalid, []string{"journal", `"maybe"`, "on, off"}},
		"ext4:1Gi:rmapbt=1":                {ErrInvalid, []string{`"rmapbt"`, "inode-size"}},
		"ext4:1Gi:label=" + long(17):       {ErrInvalid, []string{"label", "16"}},
		"ext4:1Gi:label=-O":                {ErrInvalid, []string{"label", `"-O"`}},
		"ext4:1Gi:label=a b":               {ErrInvalid, []string{"label", `"a b"`}},
		"ext4:1Gi:" + long(5000) + "=1":    {ErrInvalid, []string{"inode-size"}},
		"\xff\x00:1Gi":                     {ErrUnknown, []string{"btrfs, ext4, xfs"}},
		"ext4:1Gi:\x1b[31m=" + long(1<<20): {ErrInvalid, []string{"inode-size"}},
	} {
		_, err := ParseSpec(text)
		if !errors.Is(err, c.is) {
			t.Errorf("%.80q: %v, want %v", text, err, c.is)
			continue
		}
		for _, s := range c.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%.80q: the error does not say %s: %v", text, s, err)
			}
		}
		readable(t, err)
	}
}

func long(n int) string { return strings.Repeat("l", n) }

// readable checks a message about a text that may be hostile.
func readable(t *testing.T, err error) {
	t.Helper()
	text := err.Error()
	if !utf8.ValidString(text) || len(text) > 512 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' }) {
		t.Errorf("%d bytes: %.600q", len(text), text)
	}
	for _, fault := range plain.Faults(text) {
		t.Errorf("%s: %s", fault, text)
	}
}
