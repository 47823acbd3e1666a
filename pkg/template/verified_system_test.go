// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package template

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestVerifiedOncePerBoot opens a large template in several processes. A record that is wrong shows which
// of them have read the content.
func TestVerifiedOncePerBoot(t *testing.T) {
	p := newPool(t, testenv.XFS)
	large := diskfs.Spec{Filesystem: "raw", Content: "disk"}
	store := func() *Store {
		return newStore(t, p, func(c *Config) {
			c.Format = func(_ context.Context, f *os.File, spec diskfs.Spec) (Provenance, error) {
				_, err := f.Write(bytes.Repeat([]byte("x"), notedBytes))
				return Provenance{Fingerprint: fp}, errors.Join(err, f.Sync())
			}
		})
	}
	tmpl, err := store().Ensure(t.Context(), large)
	if err != nil {
		t.Fatal(err)
	}
	defer tmpl.Close()
	wrong := tmpl.Record
	wrong.Digest = "00"
	if err := pool.SetRecord(tmpl.File, pool.TemplateAttr, wrong); err != nil { // which changes its ctime
		t.Fatal(err)
	}
	if _, err := store().Lookup(tmpl.Key); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a file that has changed since: %v", err)
	}

	id, err := identify(tmpl.File)
	if err != nil {
		t.Fatal(err)
	}
	note, err := id.noted()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Note(tmpl.Key, pool.VerifiedAttr, note); err != nil {
		t.Fatal(err)
	}
	again, err := store().Lookup(tmpl.Key)
	if err != nil {
		t.Fatalf("a file that was verified in this boot: %v", err)
	}
	again.Close()
	note.Boot = "another"
	if err := p.Note(tmpl.Key, pool.VerifiedAttr, note); err != nil {
		t.Fatal(err)
	}
	if _, err := store().Lookup(tmpl.Key); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a file that was verified in another boot: %v", err)
	}

	ok := tmpl.Record
	if err := pool.SetRecord(tmpl.File, pool.TemplateAttr, ok); err != nil {
		t.Fatal(err)
	}
	if again, err = store().Lookup(tmpl.Key); err != nil {
		t.Fatal(err)
	}
	again.Close()
	if id, err = identify(tmpl.File); err != nil {
		t.Fatal(err)
	}
	if !store().wasVerified(tmpl.Key, id) {
		t.Error("it is not noted that the file was verified")
	}
}
