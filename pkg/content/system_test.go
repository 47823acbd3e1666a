//go:build system

// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package content

import (
	"bytes"
	"context"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestNoSpace prepares contents that do not fit into the pool. Nothing is left of them.
func TestNoSpace(t *testing.T) {
	small := testenv.Ext4.Mount(t, 16<<20)
	noise := make([]byte, 24<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	archive := tarball(t, "noise", string(noise))

	n := newNode(t)
	n.cfg.NewFile = func() (*os.File, error) { return tmpfile.Create(small, 0o600) }
	n.cfg.Layers = func(context.Context, string) iter.Seq2[io.Reader, error] {
		return func(yield func(io.Reader, error) bool) { yield(bytes.NewReader(archive), nil) }
	}
	n.cfg.Convert = func(_ context.Context, dst, src *os.File) error {
		_, err := io.Copy(dst, src)
		return err
	}
	n.put("a", archive)
	n.list("- {name: file, tar: a, namespaces: [ci]}", "- {name: disk, disk: a, namespaces: [ci]}",
		"- {name: image, oci: localhost/a@"+sha+", namespaces: [ci]}")
	free := func() string { return testenv.Run(t, "stat", "-f", "-c", "%f", small) }
	before := free()
	for _, name := range []string{"file", "disk", "image"} {
		_, err := n.Prepare(t.Context(), name, n.identity(name))
		refuses(t, err, pool.ErrFull, `content "`+name+`": `, "no space left on device", "enlarge the pool")
		testenv.Eventually(t, "the space of "+name, func() bool { return free() == before })
	}
	testenv.Fill(t, small)
	_, err := n.Prepare(t.Context(), "file", n.identity("file"))
	refuses(t, err, pool.ErrFull)
}
