// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// FuzzNames checks that no name makes an id whose file would leave the pool's directory.
func FuzzNames(f *testing.F) {
	for _, s := range []string{
		"", ".", "..", "pvc-1", "a/b", "a\x00b", "-x", ".hidden", "a\n", "ä", "/dev/loop7", "/dev/loop07", "/dev/loop+7",
		"/var/lib/kubelet", "/var/lib/kubelet/", "/var/lib/kubelet/x", "/var/lib/kubelet/../x", "/var/lib/kubelet/..x", "/var/lib/kubeletx",
		"/var/lib/kubelet//x", "/var/lib/kubelet/x/.", "/", "ro,nosuid", "xnoexec,nodevx,roo,", "5%", "1e300%", "-0%", "NaN%", "10Gi",
		strings.Repeat("x", 120), strings.Repeat("x", 121), strings.Repeat("x", 4096), "\xff", strings.Repeat("\U000e0001", 300),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ids(t, s)
		if i, ok := loopdev.IndexOf(s); ok && fmt.Sprintf("/dev/loop%d", i) != s {
			t.Errorf("%q is loop device %d", s, i)
		}
		if h, err := size.ParseShare(s); err == nil && (h.Of(0) < 0 || h.Bytes == 0 && h.Of(diskfs.MaxSize) >= diskfs.MaxSize) {
			t.Errorf("%q is %+v", s, h)
		}
	})
}

func ids(t *testing.T, name string) {
	t.Helper()
	if err := image.CheckID(name); err != nil {
		if text := err.Error(); !errors.Is(err, errdefs.ErrInvalid) || len(text) > 1024 || !utf8.ValidString(text) {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
	for prefix, id := range map[string]string{"vol-": ClaimRequest{Name: name}.ID(), "snap-": SnapshotID(name)} {
		if err := image.CheckID(id); err != nil || len(id) > maxNameAsID || strings.ContainsAny(id, "/\x00") || strings.HasPrefix(id, ".") {
			t.Errorf("%q has the id %q: %v", name, id, err)
		}
		if id != name && !strings.HasPrefix(id, prefix) {
			t.Errorf("%q has the id %q", name, id)
		}
	}
}

// FuzzCopies reads records as they may be in a pool, and asks for the same volume again, and
// for copies. A volume must not differ from itself, and copies must stay within the limits.
func FuzzCopies(f *testing.F) {
	for _, s := range []string{
		"", "null", "{}", `[]`, `{"version":2,"id":"v"}`, `{"version":0,"id":"v"}`, `{"version":4,"id":"v"}`, `{"version":2,"id":"../v"}`, `{"version":1e99,"id":"v"}`,
		`{"version":1,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem","target":"/t","readOnly":true,"pod":{"name":"p"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"xfs","size":314572800,"label":"l","options":{"rmapbt":"1"}},"mode":"diskImage",` +
			`"uuid":"01234567-89ab-cdef-0123-456789abcdef","created":"2026-01-02T03:04:05.678Z","name":"v","thick":true,"source":{"snapshot":"s"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"raw","size":-1},"mode":"block"}`,
		`{"version":2,"id":"v","spec":{"filesystem":"ext4","size":9223372036854775807},"mode":"filesystem"}`,
		`{"version":3,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem",` +
			`"durability":"volatile","boot":"b","lost":"2026-01-02T03:04:05Z"}`,
		`{"version":2,"id":"v","name":"v","volume":"w","spec":{"filesystem":"btrfs","size":268435457},"mode":"filesystem"}`,
	} {
		f.Add([]byte(s), "v", int64(0), int64(0))
		f.Add([]byte(s), "v", int64(0), int64(diskfs.MiB))
		f.Add([]byte(s), "v", int64(diskfs.MiB), int64(1<<40))
	}
	f.Fuzz(func(t *testing.T, b []byte, id string, required, limit int64) {
		if image.CheckID(id) != nil {
			return // no file has such a name
		}
		accepted := func(have string, version int) bool { return have == id && version >= 1 && version <= 3 }
		var r image.Record
		if err := json.Unmarshal(b, &r); err == nil && accepted(r.ID, r.Version) {
			sameAsItself(t, r)
			copyOf(t, r.Spec, r.Mode, required, limit)
		}
		var s image.SnapshotRecord
		if err := json.Unmarshal(b, &s); err == nil && accepted(s.ID, s.Version) {
			if err := compareSnapshot(s, s.Name, s.Volume); err != nil {
				t.Error(err)
			}
			copyOf(t, s.Spec, s.Mode, required, limit)
		}
	})
}

func sameAsItself(t *testing.T, r image.Record) {
	t.Helper()
	inline := InlineRequest{
		ID: r.ID, Target: r.Target, Spec: r.Spec, Mode: r.Mode, Access: r.Access, Pod: r.Pod, Durability: r.Durability,
	}
	if err := inline.compare(r); (err == nil) != (r.Lifecycle == image.Inline) {
		t.Errorf("%+v as an inline volume: %v", r, err)
	}
	claim := ClaimRequest{Name: r.Name, Spec: r.Spec, Mode: r.Mode, Provisioning: r.Provisioning, Source: r.Source}
	if err := claim.compare(r); (err == nil) != (r.Lifecycle == image.Claim) {
		t.Errorf("%+v as a claim: %v", r, err)
	}
	if err := claim.CompareClass(r); (err == nil) != (r.Lifecycle == image.Claim) {
		t.Errorf("%+v of that class: %v", r, err)
	}
}

// copyOf asks for a copy within a range of sizes.
func copyOf(t *testing.T, from diskfs.Spec, mode image.Mode, required, limit int64) {
	t.Helper()
	// Only sizes that a request can have: see sizeOf in package driver.
	if required < 0 || limit < 0 || limit > 0 && limit < required {
		return
	}
	r := ClaimRequest{Name: "copy", Spec: diskfs.Spec{Size: diskfs.RoundUp(required)}, Limit: limit, Mode: mode, AnyFilesystem: true}
	if r.follow(origin{spec: from, mode: mode}) != nil || r.decideSize() != nil {
		return
	}
	if err := r.Spec.Validate(); err != nil {
		t.Error(err)
	}
	if r.Spec.Size < from.Size || required > 0 && raised(diskfs.RoundUp(required), from.Filesystem) != r.Spec.Size || limit > 0 && r.Spec.Size > limit || r.Spec.Filesystem != from.Filesystem {
		t.Errorf("a copy of %s, of %d to %d bytes, is %s", from, required, limit, r.Spec)
	}
}
