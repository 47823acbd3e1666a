// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
)

// withContents is a second plugin, whose operator names one content. It keeps nothing ready until it is told to.
type withContents struct {
	keeper
	dir string // of the list, and of the archive or disk that it names
}

// contentName is the name of the content, and of its file.
const contentName = "content"

// newWithContents starts such a plugin, after write has written the content's file: an archive or a disk, as kind says.
// The caller closes the plugin, whatever the error.
func (b *bench) newWithContents(ctx context.Context, d *bed, kind string, write func(path string) error,
	more ...string) (w withContents, err error) {
	if w.dir, err = os.MkdirTemp(b.dir, "contents-"); err != nil {
		return w, err
	}
	list := fmt.Sprintf("contents:\n- {name: %s, %s: %[1]s, namespaces: ['*']}\n", contentName, kind)
	err = errors.Join(write(w.file(contentName)), os.WriteFile(w.list(), []byte(list), 0o644))
	if err == nil {
		w.keeper, err = b.newKeeper(ctx, d, w.flags(more...)...)
	}
	return w, err
}

// file is the path of a file beside the list.
func (w withContents) file(name string) string { return filepath.Join(w.dir, name) }

func (w withContents) list() string { return w.file("contents.yaml") }

func (w withContents) flags(more ...string) []string {
	return append([]string{"--contents", w.list(), "--content-dir", w.dir}, more...)
}

// again starts the plugin anew, on the same pool, with other flags.
func (w withContents) again(ctx context.Context, b *bench, flags ...string) error {
	return w.restart(ctx, b.o.binary, append(slices.Clone(harness.AnyPort), w.flags(flags...)...)...)
}

// close is that of the keeper, if there is one.
func (w withContents) close() error {
	var err error
	if w.bed != nil {
		err = w.keeper.close()
	}
	return errors.Join(err, os.RemoveAll(w.dir))
}

// overContent is the plugin, asked for volumes that are born with the content.
type overContent struct{ overCSI }

func (w overContent) prepare(v *volume) error {
	v.csi.Context["content"] = contentName
	return w.overCSI.prepare(v)
}

// buildPatience is what the first volume of a kind gets, and its template.
const buildPatience = 20 * time.Minute

// first publishes a volume whose template is not there, and returns how long that took. A call ends before a large
// template is there. Kubelet tries again, too.
func (k keeper) first(ctx context.Context, by way, v *volume) (took time.Duration, err error) {
	if err := by.prepare(v); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, buildPatience)
	defer cancel()
	began := time.Now()
	for {
		err := by.publish(ctx, v)
		if err == nil {
			return time.Since(began), nil
		}
		if !harness.MayTryAgain(err) || ctx.Err() != nil || !k.Alive() {
			return 0, fmt.Errorf("the first volume of its kind: %w\n%s", err, k.Tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// extents counts those of the only volume that is there: on them depends what a clone costs.
func (k keeper) extents() (float64, error) {
	found, err := k.node.Find()
	if err == nil && len(found.Images) != 1 {
		err = fmt.Errorf("there are %d volumes, not one", len(found.Images))
	}
	if err != nil {
		return 0, err
	}
	f, err := os.Open(filepath.Join(k.node.Pool, "volumes", found.Images[0]))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := fiemap.Count(f)
	return float64(n), err
}
