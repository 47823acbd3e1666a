// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// FuzzRecord reads records as they may be in a pool. An accepted record must be the same
// after it is written and read again.
func FuzzRecord(f *testing.F) {
	for _, s := range []string{
		"", "null", "{}", `[]`, `{"version":2,"id":"v"}`, `{"version":0,"id":"v"}`, `{"version":4,"id":"v"}`, `{"version":2,"id":"../v"}`, `{"version":1e99,"id":"v"}`,
		`{"version":1,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem","target":"/t","readOnly":true,"pod":{"name":"p"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"xfs","size":314572800,"label":"l","options":{"rmapbt":"1"}},"mode":"diskImage",` +
			`"uuid":"01234567-89ab-cdef-0123-456789abcdef","created":"2026-01-02T03:04:05.678Z","name":"v","thick":true,"source":{"snapshot":"s"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"raw","size":-1},"mode":"block"}`,
		`{"version":2,"id":"v","spec":{"filesystem":"ext4","size":9223372036854775807},"mode":"filesystem"}`,
		`{"version":3,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem",` +
			`"durability":"volatile","boot":"b","lost":"2026-01-02T03:04:05Z"}`,
		`{"version":2,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem","context":"u:r:t:s0:c1,c2"}`,
		`{"version":2,"id":"v","name":"v","volume":"w","spec":{"filesystem":"btrfs","size":268435457},"mode":"filesystem"}`,
	} {
		f.Add([]byte(s), "v")
	}
	f.Fuzz(func(t *testing.T, b []byte, id string) {
		if CheckID(id) != nil {
			return // no file has such a name
		}
		var r Record
		if err := json.Unmarshal(b, &r); err == nil {
			readAgain(t, &r, id, r.ID, r.Version)
		}
		var s SnapshotRecord
		if err := json.Unmarshal(b, &s); err == nil {
			readAgain(t, &s, id, s.ID, s.Version)
		}
	})
}

// readAgain writes a record that is accepted as that of id, and reads it again.
func readAgain[T any](t *testing.T, record *T, id, have string, version int) {
	t.Helper()
	if err := checkRecord("path", id, have, version); err != nil {
		if !errors.Is(err, errdefs.ErrState) {
			t.Error(err)
		}
		return
	}
	if have != id || version < 1 || version > volatileVersion {
		t.Errorf("accepted version %d of %q for %q", version, have, id)
	}
	first, err := json.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	var again T
	if err := json.Unmarshal(first, &again); err != nil {
		t.Fatal(err)
	}
	second, err := json.Marshal(again)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("%s\nbecomes %s: %v", first, second, err)
	}
}
