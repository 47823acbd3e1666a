// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"encoding/json"
	"fmt"
	"math"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

const (
	// maxManifest is what registries accept, by the distribution specification.
	maxManifest = 4 << 20
	// maxLayers is four times what container runtimes can mount.
	maxLayers = 512
	// maxBlob is more than any registry takes, in bytes. It keeps sums from overflowing.
	maxBlob = 1 << 42
)

// Compression is how a layer's tar archive is compressed, by its media type.
type Compression string

// The compressions. Plain is a tar archive as it is.
const (
	Plain Compression = ""
	Gzip  Compression = "gzip"
	Zstd  Compression = "zstd"
)

// descriptor names a blob or a manifest.
type descriptor struct {
	MediaType types.MediaType `json:"mediaType"`
	Digest    string          `json:"digest"`
	Size      int64           `json:"size"`
	Platform  *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	} `json:"platform"`
}

// manifest is an image's or an artifact's manifest, or an index of them. Which one follows from its content,
// and not from a header: only the content has a digest.
type manifest struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     types.MediaType `json:"mediaType"`
	Config        *descriptor     `json:"config"`
	Layers        []descriptor    `json:"layers"`
	Manifests     []descriptor    `json:"manifests"`
}

func (m *manifest) isIndex() bool { return m.Manifests != nil }

// accepted are the manifests that are asked for.
var accepted = strings.Join([]string{
	string(types.OCIManifestSchema1), string(types.DockerManifestSchema2),
	string(types.OCIImageIndex), string(types.DockerManifestList),
}, ", ")

// parseManifest reads and checks a manifest or an index.
func parseManifest(b []byte) (*manifest, error) {
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: its manifest is not the JSON of a manifest", ErrInvalid)
	}
	switch {
	case m.SchemaVersion != 2:
		return nil, fmt.Errorf("%w: its manifest has schema version %d, and not 2; push it again with a newer program",
			ErrInvalid, m.SchemaVersion)
	case m.isIndex() && (m.Layers != nil || m.Config != nil):
		// "MUST NOT": the two could be read as different images.
		return nil, fmt.Errorf("%w: its manifest is an index and an image at once", ErrInvalid)
	case m.isIndex() && m.MediaType.IsImage(), !m.isIndex() && m.MediaType.IsIndex():
		return nil, fmt.Errorf("%w: its manifest has the media type %q, which its content is not",
			ErrInvalid, m.MediaType)
	case m.isIndex():
		return &m, nil
	}
	return &m, m.check()
}

// check checks the manifest of an image or an artifact.
func (m *manifest) check() error {
	if n := len(m.Layers); n == 0 || n > maxLayers {
		return fmt.Errorf("%w: it has %d layers, and there must be 1 to %d", ErrInvalid, n, maxLayers)
	}
	for _, d := range m.blobs() {
		if err := d.check(maxBlob); err != nil {
			return err
		}
	}
	if m.Config != nil && m.Config.Size > maxManifest {
		return fmt.Errorf("%w: its config has %d bytes; at most %d are allowed",
			ErrInvalid, m.Config.Size, maxManifest)
	}
	for i, d := range m.Layers {
		if _, err := compressionOf(d.MediaType); err != nil {
			return fmt.Errorf("%w: layer %d of %d: %w", ErrInvalid, i+1, len(m.Layers), err)
		}
	}
	if m.total() > maxBlob {
		return fmt.Errorf("%w: its layers have more than %s; that is the most of one image",
			ErrInvalid, size.Format(maxBlob))
	}
	return nil
}

// blobs are what an image consists of beside its manifest: layers, bottom first, and the config.
func (m *manifest) blobs() []descriptor {
	all := append([]descriptor(nil), m.Layers...)
	if m.Config != nil {
		all = append(all, *m.Config)
	}
	return all
}

// total is the size of all blobs, or [math.MaxInt64].
func (m *manifest) total() (sum int64) {
	for _, d := range m.blobs() {
		if sum += d.Size; sum < 0 {
			return math.MaxInt64
		}
	}
	return sum
}

// check checks what can be checked of a descriptor before its blob is there.
func (d descriptor) check(most int64) error {
	if _, err := blobName(d.Digest); err != nil {
		return err
	}
	if d.Size < 0 || d.Size > most {
		return fmt.Errorf("%w: it says that %s has %d bytes; at most %d are allowed",
			ErrInvalid, d.Digest, d.Size, most)
	}
	return nil
}

// pick returns the manifest of an index that is for this machine: the first for linux and this architecture,
// or the only one, if it names no platform.
func (m *manifest) pick() (descriptor, error) {
	var seen []string
	for _, d := range m.Manifests {
		if d.Platform == nil {
			if len(m.Manifests) == 1 {
				return d, d.check(maxManifest)
			}
			continue
		}
		if d.Platform.OS == "linux" && d.Platform.Architecture == runtime.GOARCH {
			return d, d.check(maxManifest)
		}
		if len(seen) < 20 {
			seen = append(seen, fmt.Sprintf("%.20s/%.20s", d.Platform.OS, d.Platform.Architecture))
		}
	}
	return descriptor{}, fmt.Errorf("%w: it is not for linux/%s, but only for %q; push it for this platform too",
		ErrNotFound, runtime.GOARCH, strings.Join(seen, ", "))
}

// suffixes are the ends of media types that are tar archives. Docker's have a dot before the compression.
var suffixes = map[string]Compression{
	"tar": Plain, "tar+gzip": Gzip, "tar.gzip": Gzip, "tar+zstd": Zstd, "tar.zstd": Zstd,
}

// compressionOf returns how a layer of this media type is compressed. Besides the types of docker and OCI,
// artifacts may have layers of any type whose name ends as theirs do.
func compressionOf(t types.MediaType) (Compression, error) {
	name := string(t)
	if !t.IsDistributable() || strings.Contains(name, "nondistributable") || strings.Contains(name, ".foreign.") {
		return "", fmt.Errorf("its media type %q is for layers that registries do not have; push it with its foreign layers included",
			t)
	}
	for suffix, c := range suffixes {
		if strings.HasSuffix(name, suffix) {
			return c, nil
		}
	}
	return "", fmt.Errorf("its media type %q is not that of a tar archive, which ends in tar, tar+gzip or tar+zstd",
		t)
}
