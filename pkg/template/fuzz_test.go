// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package template

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
)

// FuzzRecord reads records as they may be found in a pool, and names templates. An accepted
// record must belong to its key, and describe what the key says. The key of a valid spec must be
// usable as a file's name, and differ from that of any other content.
func FuzzRecord(f *testing.F) {
	const fp = "0123456789abcdef"
	ext4 := diskfs.Spec{Filesystem: "ext4", Size: 256 * diskfs.MiB, Label: "l", Options: map[string]string{"journal": "off"}}
	good, err := json.Marshal(Record{Version: recordVersion, Key: Key(ext4, fp), Spec: ext4, Provenance: Provenance{Fingerprint: fp}})
	if err != nil {
		f.Fatal(err)
	}
	for _, b := range [][]byte{nil, good, []byte("null"), bytes.ReplaceAll(good, []byte("ext4"), []byte("raw")),
		bytes.Replace(good, []byte(`"ext4"`), []byte(`"xfs"`), 1), bytes.Replace(good, []byte("268435456"), []byte("268435457"), 1),
		bytes.Replace(good, []byte(`"key":"ext4`), []byte(`"key":"xfs`), 1)} {
		f.Add(b, Key(ext4, fp), int64(256*diskfs.MiB), "ext4", int64(diskfs.MiB*9), "l", "journal", "on")
		f.Add(b, Key(ext4, fp), int64(256*diskfs.MiB), "xfs", int64(diskfs.MaxSize), "l", "inode-size", "512")
	}
	f.Add(good, Key(ext4, fp), int64(256*diskfs.MiB+1), "btrfs", int64(1<<30), "", "", "")
	f.Fuzz(func(t *testing.T, b []byte, key string, size int64, filesystem string, asked int64, label, option, value string) {
		var r Record
		if err := json.Unmarshal(b, &r); err == nil {
			accepted(t, r, key, size)
		}
		spec := diskfs.Spec{Filesystem: filesystem, Size: asked, Label: label}
		if option != "" {
			spec.Options = map[string]string{option: value}
		}
		if spec.Validate() != nil {
			return
		}
		name := Key(spec, fp)
		if !keyPattern.MatchString(name) || filepath.Base(name) != name || len(name) > 128 {
			t.Errorf("%s has the key %q", spec, name)
		}
		// newest finds templates by the beginning of their names.
		if r.Spec.Validate() == nil && strings.HasPrefix(Key(r.Spec, fp), Key(spec, "")) != (spec.Filesystem == r.Spec.Filesystem && spec.Size == r.Spec.Size) {
			t.Errorf("a search for %s finds %s, or misses it", spec, r.Spec)
		}
	})
}

func accepted(t *testing.T, r Record, key string, size int64) {
	t.Helper()
	fs, err := r.fits(key, size)
	if err != nil {
		return
	}
	if r.Version != recordVersion || r.Key != key || r.Spec.Size != size || fs.Name != r.Spec.Filesystem || key != Key(r.Spec, r.Provenance.Fingerprint) {
		t.Errorf("%+v was accepted for %q with %d bytes", r, key, size)
	}
	first, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var again Record
	if err := json.Unmarshal(first, &again); err != nil {
		t.Fatal(err)
	}
	second, err := json.Marshal(again)
	if err != nil || !bytes.Equal(first, second) || !again.Spec.Equal(r.Spec) {
		t.Errorf("%s\nbecomes %s: %v", first, second, err)
	}
}
