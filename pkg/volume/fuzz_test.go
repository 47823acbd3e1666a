// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// FuzzNames: whatever a name, a path or a line of the mount table says, a file of
// ours stays in the pool's directory, and a target below the kubelet's.
func FuzzNames(f *testing.F) {
	for _, s := range []string{
		"", ".", "..", "pvc-1", "a/b", "a\x00b", "-x", ".hidden", "a\n", "ä", "/dev/loop7", "/dev/loop07", "/dev/loop+7",
		"/var/lib/kubelet", "/var/lib/kubelet/", "/var/lib/kubelet/x", "/var/lib/kubelet/../x", "/var/lib/kubelet/..x", "/var/lib/kubeletx",
		"/var/lib/kubelet//x", "/var/lib/kubelet/x/.", "/", "ro,nosuid", "xnoexec,nodevx,roo,", "5%", "1e300%", "-0%", "NaN%", "10Gi",
		strings.Repeat("x", 120), strings.Repeat("x", 121), strings.Repeat("x", 4096), "\xff", strings.Repeat("\U000e0001", 300),
	} {
		f.Add(s, "/var/lib/kubelet", uint8(0))
		f.Add(s, "/", uint8(0x15))
	}
	f.Fuzz(func(t *testing.T, s, root string, bits uint8) {
		ids(t, s)
		below(t, s, root)
		options(t, s, bits)
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
	if err := CheckID(name); err != nil {
		if text := err.Error(); !errors.Is(err, ErrInvalid) || len(text) > 1024 || !utf8.ValidString(text) {
			t.Errorf("%d bytes: %v", len(text), err)
		}
	}
	for prefix, id := range map[string]string{"vol-": ClaimRequest{Name: name}.ID(), "snap-": SnapshotID(name)} {
		if err := CheckID(id); err != nil || len(id) > maxNameAsID || strings.ContainsAny(id, "/\x00") || strings.HasPrefix(id, ".") {
			t.Errorf("%q has the id %q: %v", name, id, err)
		}
		if id != name && !strings.HasPrefix(id, prefix) {
			t.Errorf("%q has the id %q", name, id)
		}
	}
}

func below(t *testing.T, target, root string) {
	t.Helper()
	if !filepath.IsAbs(root) {
		root = "/var/lib/kubelet"
	}
	m := &Manager{rootPath: filepath.Clean(root)} // as filepath.Abs does
	rel, err := m.relative(target)
	if err != nil {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", target, err)
		}
		return
	}
	if !filepath.IsLocal(rel) || rel == "." || filepath.Clean(rel) != rel || filepath.Join(m.rootPath, rel) != filepath.Clean(target) || strings.ContainsRune(rel, 0) {
		t.Errorf("%q is %q below %q", target, rel, m.rootPath)
	}
	for _, name := range strings.Split(strings.Trim(target, "/"), "/") {
		if name == "" || name == "." || name == ".." {
			t.Errorf("%q is accepted", target)
		}
	}
}

// options: what a mount allows is read from among the options of others.
func options(t *testing.T, noise string, bits uint8) {
	t.Helper()
	for _, option := range strings.Split(noise, ",") {
		if slices.Contains([]string{"ro", "noatime", "noexec", "nosuid", "nodev"}, option) {
			return // no noise
		}
	}
	a := Access{ReadOnly: bits&1 != 0, NoATime: bits&2 != 0, NoExec: bits&4 != 0, SUID: bits&8 != 0, Dev: bits&16 != 0}
	for _, text := range []string{a.String(), a.String() + "," + noise, noise + "," + a.String()} {
		if got := accessOf(&mountinfo.Info{Options: text}); got != a {
			t.Errorf("%q allows %s, not %s", text, got, a)
		}
	}
}

// FuzzRecord reads records as they may stand in a pool, and asks for copies of what
// they say: what is accepted says the same when it is written again, is the same as
// itself, and leads to volumes within the limits only.
func FuzzRecord(f *testing.F) {
	for _, s := range []string{
		"", "null", "{}", `[]`, `{"version":2,"id":"v"}`, `{"version":0,"id":"v"}`, `{"version":3,"id":"v"}`, `{"version":2,"id":"../v"}`, `{"version":1e99,"id":"v"}`,
		`{"version":1,"id":"v","spec":{"filesystem":"ext4","size":268435456},"mode":"filesystem","target":"/t","readOnly":true,"pod":{"name":"p"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"xfs","size":314572800,"label":"l","options":{"rmapbt":"1"}},"mode":"diskImage",` +
			`"uuid":"01234567-89ab-cdef-0123-456789abcdef","created":"2026-01-02T03:04:05.678Z","name":"v","thick":true,"source":{"snapshot":"s"}}`,
		`{"version":2,"id":"v","lifecycle":"persistent","spec":{"filesystem":"raw","size":-1},"mode":"block"}`,
		`{"version":2,"id":"v","spec":{"filesystem":"ext4","size":9223372036854775807},"mode":"filesystem"}`,
		`{"version":2,"id":"v","name":"v","volume":"w","spec":{"filesystem":"btrfs","size":268435457},"mode":"filesystem"}`,
	} {
		f.Add([]byte(s), "v", int64(0), int64(0))
		f.Add([]byte(s), "v", int64(0), int64(diskfs.MiB))
		f.Add([]byte(s), "v", int64(diskfs.MiB), int64(1<<40))
	}
	f.Fuzz(func(t *testing.T, b []byte, id string, required, limit int64) {
		if CheckID(id) != nil {
			return // no file has such a name
		}
		var r Record
		if err := json.Unmarshal(b, &r); err == nil && readAgain(t, &r, id, r.ID, r.Version) {
			sameAsItself(t, r)
			copyOf(t, r.Spec, r.Mode, required, limit)
		}
		var s Snapshot
		if err := json.Unmarshal(b, &s); err == nil && readAgain(t, &s, id, s.ID, s.Version) {
			if err := s.same(s.Name, s.Volume); err != nil {
				t.Error(err)
			}
			copyOf(t, s.Spec, s.Mode, required, limit)
		}
	})
}

// readAgain reports whether a record is accepted as that of id.
func readAgain[T any](t *testing.T, record *T, id, have string, version int) bool {
	t.Helper()
	if err := checkRecord("path", id, have, version); err != nil {
		if !errors.Is(err, ErrState) {
			t.Error(err)
		}
		return false
	}
	if have != id || version < 1 || version > recordVersion {
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
	return true
}

func sameAsItself(t *testing.T, r Record) {
	t.Helper()
	if err := r.sameInline(Request{ID: r.ID, Target: r.Target, Spec: r.Spec, Mode: r.Mode, Access: r.Access, Pod: r.Pod}); (err == nil) != (r.Lifecycle == Ephemeral) {
		t.Errorf("%+v as an inline volume: %v", r, err)
	}
	claim := ClaimRequest{Name: r.Name, Spec: r.Spec, Mode: r.Mode, Thick: r.Thick, Source: r.Source}
	if err := r.sameClaim(claim); (err == nil) != (r.Lifecycle == Persistent) {
		t.Errorf("%+v as a claim: %v", r, err)
	}
	if err := r.MadeAs(claim); (err == nil) != (r.Lifecycle == Persistent) {
		t.Errorf("%+v of that class: %v", r, err)
	}
}

// copyOf asks for a copy, larger or not.
func copyOf(t *testing.T, from diskfs.Spec, mode Mode, required, limit int64) {
	t.Helper()
	// As a request can have them: see sizeOf in package driver.
	if required < 0 || limit < 0 || limit > 0 && limit < required {
		return
	}
	r := ClaimRequest{Name: "copy", Spec: diskfs.Spec{Size: diskfs.RoundUp(required)}, Limit: limit, Mode: mode, DefaultSpec: true}
	if r.follow(from, mode) != nil || r.decideSize() != nil {
		return
	}
	if err := r.Spec.Validate(); err != nil {
		t.Error(err)
	}
	if r.Spec.Size < from.Size || required > 0 && diskfs.RoundUp(required) != r.Spec.Size || limit > 0 && r.Spec.Size > limit || r.Spec.Filesystem != from.Filesystem {
		t.Errorf("a copy of %s, of %d to %d bytes, is %s", from, required, limit, r.Spec)
	}
}
