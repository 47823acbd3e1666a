// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// theContents are those of an operator: all may use files and disk, and only shop may use its own.
func theContents(name, namespace string) (Content, error) {
	switch {
	case name == "files":
		return Content{Size: 2 << 30}, nil
	case name == "disk":
		return Content{Disk: true}, nil
	case name == "sized-disk":
		return Content{Disk: true, Size: 5 << 30}, nil
	case name == "shops" && namespace == "shop":
		return Content{}, nil
	}
	return Content{}, fmt.Errorf("%w: content %s: does not exist, or is not for namespace %s", errdefs.ErrNotFound, name, namespace)
}

// TestGiven checks what a content decides.
func TestGiven(t *testing.T) {
	m := &Manager{contentOf: theContents}
	type spec = diskfs.Spec
	for _, c := range []struct {
		spec spec
		mode image.Mode
		want string // the spec, or the end of the error
	}{
		{spec{Filesystem: "xfs", Size: 300 << 20}, image.ModeFilesystem, "xfs 300Mi"},
		{spec{Content: "files"}, image.ModeFilesystem, "ext4 2Gi content=files"},
		{spec{Content: "files", Filesystem: "xfs"}, image.ModeFilesystem, "xfs 2Gi content=files"},
		{spec{Content: "files", Size: 3 << 30}, image.ModeDiskImage, "ext4 3Gi content=files"},
		{spec{Content: "files", Filesystem: "btrfs"}, image.ModeBlock, "btrfs 2Gi content=files"},
		{spec{Content: "shops"}, image.ModeFilesystem, "ext4 256Mi content=shops"},
		{spec{Content: "shops", Filesystem: "xfs"}, image.ModeFilesystem, "xfs 300Mi content=shops"},
		{spec{Content: "disk", Size: 4 << 30}, image.ModeDiskImage, "raw 4Gi content=disk"},
		{spec{Content: "disk", Filesystem: "ext4", Size: 4 << 30}, image.ModeDiskImage, "raw 4Gi content=disk"},
		{spec{Content: "disk", Filesystem: "raw", Size: 4 << 30}, image.ModeBlock, "raw 4Gi content=disk"},
		{spec{Content: "sized-disk"}, image.ModeDiskImage, "raw 5Gi content=sized-disk"},

		{spec{Content: "disk", Size: 4 << 30}, image.ModeFilesystem, "it is a whole disk, and cannot be mounted; ask for publishAs diskImage, or a claim with volumeMode Block"},
		{spec{Content: "disk", Filesystem: "xfs", Size: 4 << 30}, image.ModeDiskImage, "leave out format, fsType, label and format options"},
		{spec{Content: "disk", Filesystem: "ext4", Size: 4 << 30}, image.ModeBlock, "leave out format, fsType, label and format options"},
		{spec{Content: "disk", Label: "l", Size: 4 << 30}, image.ModeDiskImage, "leave out format, fsType, label and format options"},
		{spec{Content: "disk"}, image.ModeDiskImage, "size: must be given for a volume with the content disk"},
		{spec{Content: "files", Filesystem: "raw"}, image.ModeBlock, "content files: it is files, and needs a filesystem; set the parameter format"},
		{spec{Content: "files", Size: 1 << 20}, image.ModeFilesystem, "1Mi is outside the limits of ext4, 9Mi to 8Ti; ask for a size in between"},
		{spec{Content: "none"}, image.ModeFilesystem, "content none: does not exist, or is not for namespace shop"},
	} {
		got, err := m.given(c.spec, c.mode, "shop")
		if err == nil && got.String() != c.want {
			t.Errorf("%s as %s is %s, not %s", c.spec, c.mode, got, c.want)
		}
		if err != nil && !strings.HasSuffix(err.Error(), c.want) {
			t.Errorf("%s as %s: %v, want …%s", c.spec, c.mode, err, c.want)
		}
		if err != nil {
			for _, fault := range plain.Faults(err.Error()) {
				t.Error(fault)
			}
		}
	}
	if _, err := m.given(spec{Content: "shops"}, image.ModeFilesystem, "ci"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("another namespace: %v", err)
	}
	if _, err := new(Manager).given(spec{Content: "files"}, image.ModeFilesystem, "ci"); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("a node without contents: %v", err)
	}
}

// TestRepeatedWithContent repeats requests that left something to a content, which was changed since.
func TestRepeatedWithContent(t *testing.T) {
	r := InlineRequest{ID: "v", Target: "/k/pods/u/v", Spec: diskfs.Spec{Content: "files"}, Mode: image.ModeFilesystem}
	have := r.record()
	have.Spec = diskfs.Spec{Content: "files", Filesystem: "xfs", Size: 2 << 30}
	if err := r.compare(have); err != nil {
		t.Error(err)
	}
	r.Spec.Filesystem = "ext4"
	if err := r.compare(have); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("another filesystem: %v", err)
	}
	r.Spec = diskfs.Spec{Content: "others"}
	if err := r.compare(have); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("another content: %v", err)
	}
	copied := ClaimRequest{Name: "v", Spec: diskfs.Spec{Content: "others"}, Mode: image.ModeFilesystem, Source: image.Source{Snapshot: "s"}}
	made := copied.record()
	made.Spec = have.Spec
	if err := copied.compare(made); err != nil {
		t.Errorf("a copy, whose content is that of its source: %v", err)
	}
	if err := copied.follow(origin{spec: have.Spec, mode: image.ModeFilesystem}); err != nil || !copied.Spec.Equal(have.Spec) {
		t.Errorf("a copy becomes %s: %v", copied.Spec, err)
	}
}
