// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// born is a plugin with contents.
type born struct {
	*prewarmed
	client *harness.Client
	list   string
	dir    string
}

// startBorn starts a plugin on a new pool with a list of contents, and a directory of their files.
func startBorn(t *testing.T, kind testenv.Kind, list string, flags ...string) *born {
	t.Helper()
	n := harnesstest.New(t, filepath.Join(kind.Pool(t), "pool"))
	dir := testenv.Dir(t)
	b := &born{list: filepath.Join(dir, "contents.yaml"), dir: filepath.Join(dir, "files")}
	if err := os.Mkdir(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b.prewarmed = &prewarmed{T: t}
	b.write(b.list, []byte(list))
	b.prewarmed = startPrewarmed(t, n, nil, append([]string{"--contents", b.list, "--content-dir", b.dir}, flags...)...)
	b.client = harnesstest.Connect(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := b.Serves(ctx, b.client); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *born) write(path string, content []byte) {
	b.Helper()
	if err := os.WriteFile(path+".new", content, 0o644); err != nil {
		b.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		b.Fatal(err)
	}
}

// file is a regular file of an archive.
type file struct {
	name, text string
	uid        int
}

// archiveOf makes a tar archive with a directory d and files in it.
func archiveOf(t *testing.T, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o640, Size: int64(len(f.text)), Uid: f.uid, Gid: f.uid, ModTime: time.Unix(1e9, 0)}
		if err := errors.Join(w.WriteHeader(h), write(w, f.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func write(w *tar.Writer, text string) error {
	_, err := w.Write([]byte(text))
	return err
}

func zipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err := w.Write(b)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// publish publishes an inline volume of the namespace shop.
func (b *born) publish(id, fsType string, attributes ...string) (*harness.Volume, error) {
	b.Helper()
	of := map[string]string{}
	for i := 0; i < len(attributes); i += 2 {
		of[attributes[i]] = attributes[i+1]
	}
	v := b.Inline(id, fsType, harness.Pod{Namespace: "shop", Name: id, UID: id}, of)
	if err := v.MakeDirs(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), 90*time.Second)
	defer cancel()
	for {
		err := b.client.Publish(ctx, v)
		if status.Code(err) != codes.Aborted {
			return v, err
		}
	}
}

func (b *born) mustPublish(id, fsType string, attributes ...string) *harness.Volume {
	b.Helper()
	v, err := b.publish(id, fsType, attributes...)
	if err != nil {
		b.Fatal(err)
	}
	return v
}

func (b *born) mustUnpublish(v *harness.Volume) {
	b.Helper()
	if err := b.client.Unpublish(b.Context(), v); err != nil {
		b.Error(err)
	}
}

// mustHave checks the files of a volume.
func (b *born) mustHave(v *harness.Volume, want ...file) {
	b.Helper()
	for _, f := range want {
		path := filepath.Join(v.Target, f.name)
		got, err := os.ReadFile(path)
		if err != nil || string(got) != f.text {
			b.Errorf("%s has %.40q: %v", path, got, err)
		}
		if owner := strings.TrimSpace(testenv.Run(b.T, "stat", "-c", "%u %a", path)); owner != fmt.Sprintf("%d 640", f.uid) {
			b.Errorf("%s has owner and mode %s", path, owner)
		}
	}
}

// TestBornFull publishes volumes with the files of an archive, on each pool and filesystem. Each has its own, and may
// write to them.
func TestBornFull(t *testing.T) {
	files := []file{{"d/a", "first", 1000}, {"d/sub/b", strings.Repeat("second ", 1000), 0}}
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			b := startBorn(t, kind, "contents:\n- {name: files, tar: files.tgz, namespaces: [shop]}\n- {name: theirs, tar: files.tgz, namespaces: [ci]}\n")
			b.write(filepath.Join(b.dir, "files.tgz"), zipped(t, archiveOf(t, files...)))
			for _, fs := range []string{"ext4", "xfs", "btrfs"} {
				one, two := b.mustPublish(fs+"-1", fs, "content", "files", "size", "400Mi"), b.mustPublish(fs+"-2", fs, "content", "files", "size", "400Mi")
				b.mustHave(one, files...)
				if err := os.WriteFile(filepath.Join(one.Target, "d/a"), []byte("changed"), 0o640); err != nil {
					t.Error(err)
				}
				b.mustHave(two, files...)
				b.mustUnpublish(one)
				b.mustUnpublish(two)
			}

			for _, c := range []struct {
				attributes []string
				code       codes.Code
				says       []string
			}{
				{[]string{"content", "theirs"}, codes.InvalidArgument, []string{`"theirs"`, "shop", "files"}},
				{[]string{"content", "nothing"}, codes.InvalidArgument, []string{`"nothing"`, "files"}},
				{[]string{"content", "files", "publishAs", "filesystem", "size", "8Mi"}, codes.OutOfRange, []string{"8Mi", "9Mi"}},
			} {
				v, err := b.publish("bad", "ext4", c.attributes...)
				if status.Code(err) != c.code {
					t.Errorf("%v: %v, want %s", c.attributes, err, c.code)
				}
				mustSay(t, err, c.says...)
				b.mustUnpublish(v)
			}
		})
	}
}

// TestBornAhead prewarms a template with a content. The list of contents gets the content after the plugin has started.
func TestBornAhead(t *testing.T) {
	b := startBorn(t, testenv.XFS, "contents: []\n", "--prewarm", "ext4:64Mi:content=files")
	b.write(filepath.Join(b.dir, "files.tar"), archiveOf(t, file{"a", "text", 1}))
	b.await("the condition of a template without content", func() bool {
		_, page := b.get("/readyz")
		return strings.Contains(page, "PrewarmFailed") && strings.Contains(page, `"files"`)
	})
	b.write(b.list, []byte("contents:\n- {name: files, tar: files.tar, namespaces: ['*']}\n"))
	b.await("the template", func() bool { return slices.Equal(b.templates(), []string{"ext4-64m"}) })
	v := b.mustPublish("v", "ext4", "content", "files", "size", "64Mi")
	b.mustHave(v, file{"a", "text", 1})
	b.mustUnpublish(v)
}

// TestContentChanges replaces the file of a content. New volumes have the new files, and others keep theirs.
func TestContentChanges(t *testing.T) {
	b := startBorn(t, testenv.XFS, "contents:\n- {name: files, tar: files.tar, namespaces: ['*'], size: 64Mi, owner: '7:8', mode: '0711'}\n")
	path := filepath.Join(b.dir, "files.tar")
	old, fresh := []file{{"a", "old", 1}}, []file{{"a", "new", 2}}

	v, err := b.publish("early", "ext4", "content", "files")
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("without the file: %v", err)
	}
	mustSay(t, err, `"files"`, "files.tar", "no such file")
	b.mustUnpublish(v)

	b.write(path, archiveOf(t, old...))
	first := b.mustPublish("first", "ext4", "content", "files")
	if owner := strings.TrimSpace(testenv.Run(t, "stat", "-c", "%u:%g %a", first.Target)); owner != "7:8 711" {
		t.Errorf("the root directory has owner and mode %s", owner)
	}
	b.write(path, archiveOf(t, fresh...))
	second := b.mustPublish("second", "ext4", "content", "files")
	b.mustHave(first, old...)
	b.mustHave(second, fresh...)
	b.mustUnpublish(first)
	b.mustUnpublish(second)

	b.write(path, archiveOf(t, file{"big", strings.Repeat("x", 100<<20), 0}))
	v, err = b.publish("large", "ext4", "content", "files")
	if status.Code(err) != codes.OutOfRange {
		t.Errorf("too large: %v", err)
	}
	mustSay(t, err, "content files", "100Mi", "the volume has 64Mi: ask for a larger size")
	b.mustUnpublish(v)
	b.write(path, []byte("this is no archive"))
	v, err = b.publish("damaged", "ext4", "content", "files")
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("damaged: %v", err)
	}
	mustSay(t, err, `"files"`)
	b.mustUnpublish(v)
}

// TestBornOfImages has contents from a registry: layers with a whiteout, and the disk of a containerDisk.
func TestBornOfImages(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")
	push := func(repository string, layers ...[]byte) (digest string) {
		t.Helper()
		img := v1.Image(empty.Image)
		for _, l := range layers {
			var err error
			if img, err = mutate.AppendLayers(img, static.NewLayer(zipped(t, l), types.DockerLayer)); err != nil {
				t.Fatal(err)
			}
		}
		ref, err := name.ParseReference(host + "/" + repository)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img); err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d.String()
	}
	push("files:1", archiveOf(t, file{"gone", "x", 0}, file{"kept", "first", 3}), archiveOf(t, file{".wh.gone", "", 0}, file{"new", "second", 4}))

	dir := testenv.Dir(t)
	raw, qcow2 := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.qcow2")
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	if err := os.WriteFile(raw, append(content, make([]byte, 4<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", "-c", raw, qcow2).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	packed, err := os.ReadFile(qcow2)
	if err != nil {
		t.Fatal(err)
	}
	digest := push("disks/d:1", archiveOf(t, file{"disk/d.qcow2", string(packed), 107}))

	b := startBorn(t, testenv.XFS, fmt.Sprintf("contents:\n- {name: image, oci: '%s/files:1', namespaces: ['*'], size: 64Mi}\n"+
		"- {name: vm, disk: 'oci://%[1]s/disks/d@%s', namespaces: ['*']}\n", host, digest))
	v := b.mustPublish("image", "ext4", "content", "image")
	b.mustHave(v, file{"kept", "first", 3}, file{"new", "second", 4})
	if _, err := os.Lstat(filepath.Join(v.Target, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that the upper layer takes away: %v", err)
	}
	b.mustUnpublish(v)

	v = b.mustPublish("vm", "", "content", "vm", "size", "16Mi", "publishAs", "diskImage")
	got, err := os.ReadFile(filepath.Join(v.Target, "disk.img"))
	if want := append(content, make([]byte, 15<<20)...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk has %d bytes, and not what the image's has, and zeros: %v", len(got), err)
	}
	b.mustUnpublish(v)

	server.Close() // what was pulled is there
	v = b.mustPublish("again", "xfs", "content", "image", "size", "300Mi")
	b.mustHave(v, file{"kept", "first", 3}, file{"new", "second", 4})
	b.mustUnpublish(v)
}
