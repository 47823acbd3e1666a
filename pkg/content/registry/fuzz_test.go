// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
)

// FuzzManifest: what a manifest passes can be pulled, within the bounds.
func FuzzManifest(f *testing.F) {
	const digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	for _, seed := range []string{
		`{"schemaVersion":2,"config":{"digest":"` + digest + `","size":2},
			"layers":[{"mediaType":"x.tar","digest":"` + digest + `","size":3}]}`,
		`{"schemaVersion":2,
			"manifests":[{"digest":"` + digest + `","size":3,"platform":{"os":"linux","architecture":"amd64"}}]}`,
		`{"schemaVersion":2,"manifests":[{"digest":"` + digest + `","size":3}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if m.isIndex() {
			d, err := m.pick()
			if err == nil && (!digestForm.MatchString(d.Digest) || d.Size < 0 || d.Size > maxManifest) {
				t.Fatalf("picked %+v", d)
			}
			return
		}
		for _, d := range m.blobs() {
			if !digestForm.MatchString(d.Digest) || d.Size < 0 || d.Size > maxBlob {
				t.Fatalf("%+v passes", d)
			}
		}
		if n, sum := len(m.Layers), m.total(); n < 1 || n > maxLayers || sum < 0 || sum > maxBlob {
			t.Fatalf("%d layers with %d bytes pass", n, sum)
		}
	})
}

// FuzzDockerConfig: a file is a docker config file or none, and a repository has credentials or none.
func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"registry.example":{"auth":"b3RoZXI6eA=="}},"credHelpers":{"registry.example":"x"}}`))
	f.Add([]byte(`{"auths":{"https://docker.io/v1/":{"username":"a","password":"b"}}}`))
	repo, err := name.NewRepository("registry.example/team/app")
	if err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := readConfig(path)
		if err == nil && !json.Valid(b) {
			t.Fatalf("%q passes", b)
		}
		if err == nil {
			config.find(repo)
			config.wantsHelper(repo)
		}
	})
}
