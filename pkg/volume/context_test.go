// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/plain"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/selinux"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/vmformat/guest"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/warm"
)

// Two contexts, as the kernel shows them.
const (
	podContext   = "system_u:object_r:container_file_t:s0:c1,c2"
	otherContext = "system_u:object_r:container_file_t:s0:c3,c4"
)

// TestContext has volumes with the SELinux context of their pod. On a kernel without SELinux they
// are refused, and leave nothing.
//
// TestContextByKernel in pkg/vmformat runs this test in a VM, on a kernel that has it.
func TestContext(t *testing.T) {
	enabled, err := selinux.Enabled()
	if err != nil || guest.IsInit() && !enabled {
		t.Fatalf("SELinux is enabled: %v, %v", enabled, err)
	}
	n := newContextNode(t)
	if !enabled {
		n.contextRefused()
		return
	}
	for _, fs := range diskfs.Names() {
		t.Run(fs, func(t *testing.T) {
			n.with(t).contextInline(fs)
			n.with(t).contextClaim(fs)
		})
	}
	t.Run("disk.img", func(t *testing.T) { n.with(t).contextDisk() })
	t.Run("shown", func(t *testing.T) { n.with(t).contextShown() })
	t.Run("unknown", func(t *testing.T) { n.with(t).contextUnknown() })
}

// newContextNode makes a node whose templates are formatted here and now.
func newContextNode(t *testing.T) *node {
	n := newBoundNode(t, pool.Config{Dir: filepath.Join(testenv.Dir(t), "pool"), LoopbackSize: 2 * gib})
	store := template.NewStore(template.Config{
		Pool:        n.pool,
		Fingerprint: func(diskfs.Spec) (string, error) { return "0123456789abcdef", nil },
		Format:      mkfs,
	})
	t.Cleanup(store.Close)
	m, err := NewManager(Config{Pool: n.pool, Templates: store, TargetRoot: n.kubelet, Warm: 1, WarmMost: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	n.Manager = m
	return n
}

// mkfs formats an empty file.
func mkfs(_ context.Context, f *os.File, spec diskfs.Spec) (p template.Provenance, err error) {
	fs, err := diskfs.Lookup(spec.Filesystem)
	if err != nil {
		return p, err
	}
	if err := f.Truncate(spec.Size); err != nil {
		return p, err
	}
	cmd := exec.Command(fs.Mkfs, fs.MkfsArgs("/proc/self/fd/3", spec.Label, spec.Options)...)
	cmd.ExtraFiles = []*os.File{f}
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("%w: %s", err, out)
	}
	sb, err := fs.Identify(f)
	if err != nil {
		return p, err
	}
	return template.Provenance{Fingerprint: "0123456789abcdef", UUID: sb.UUID.String()}, f.Sync()
}

// contextRefused: the error says why, before anything is made.
func (n *node) contextRefused() {
	t := n.t
	_, err := mount.New(mount.Config{FSType: "tmpfs", Source: "test", Data: []string{"context=" + podContext}})
	if !errors.Is(err, syscall.EINVAL) {
		t.Errorf("the kernel accepts a context: %v", err)
	}
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "SELinux is not enabled") || !strings.Contains(err.Error(), podContext) {
			t.Errorf("%s: %v", what, err)
			return
		}
		for _, fault := range plain.Faults(err.Error()) {
			t.Errorf("%s: %s", what, fault)
		}
	}
	for _, mode := range image.MountModes {
		r := n.request("refused", "ext4", 64*mib)
		r.Mode, r.Context = mode, podContext
		_, err := n.PublishInline(t.Context(), r)
		refused("inline "+string(mode), err)
		v := n.mustCreate(ClaimRequest{Name: "refused", Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: mode})
		p := n.publishRequest(v, "pod")
		p.Context = podContext
		refused("staging "+string(mode), n.Stage(t.Context(), StageRequest{ID: v.ID, Staging: p.Staging, Use: p.Use}))
		refused("publishing "+string(mode), n.PublishClaim(t.Context(), p))
		n.mustDelete(v.ID)
	}
	n.mustBeEmpty()
}

// labelOf is the label of a file, as a program sees it.
func (n *node) labelOf(path string) string {
	n.t.Helper()
	f, err := os.Open(path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	label, err := selinux.Label(f)
	if err != nil {
		n.t.Error(err)
	}
	return label
}

// mustHave checks that a directory, a new file in it and the mount table have a context.
func (n *node) mustHave(at, context string) {
	n.t.Helper()
	file := filepath.Join(at, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		n.t.Error(err)
	}
	for _, path := range []string{at, file} {
		if got := n.labelOf(path); got != context {
			n.t.Errorf("%s has the label %s, not %s", path, got, context)
		}
	}
	if options := tableOptions(n.t, at); !strings.Contains(options, fmt.Sprintf(",context=%q", context)) {
		n.t.Errorf("the mount table shows %s", options)
	}
}

// tableOptions are the options of the filesystem that is mounted at a path, as the kernel writes them.
func tableOptions(t testing.TB, at string) string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); fields[4] == at {
			return fields[len(fields)-1]
		}
	}
	return ""
}

// mustDiffer checks that a context is not the one that a volume has.
func (n *node) mustDiffer(err error) {
	n.t.Helper()
	if !errors.Is(err, errdefs.ErrExists) || !strings.Contains(err.Error(), podContext) {
		n.t.Errorf("with another context: %v", err)
	}
}

func sizeFor(filesystem string) int64 {
	fs, _ := diskfs.Lookup(filesystem)
	return max(fs.MinSize, 64*mib)
}

func (n *node) contextInline(fs string) {
	t := n.t
	r := n.request("inline-"+fs, fs, sizeFor(fs))
	n.mustPublish(r)
	if options := tableOptions(t, r.Target); strings.Contains(options, "context=") {
		t.Errorf("without a context the mount table shows %s", options)
	}
	if got := n.labelOf(r.Target); got == podContext {
		t.Errorf("without a context the root has the label %s", got)
	}
	other := r
	other.Context = podContext
	if _, err := n.PublishInline(t.Context(), other); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("with a context: %v", err)
	}
	n.mustUnpublish(r)

	// What is ready by now is mounted without a context.
	testenv.Eventually(t, "a volume that is ready", func() bool {
		shelves, _ := n.Warm()
		return slices.ContainsFunc(shelves, func(s warm.Shelf) bool {
			return s.Spec.Filesystem == fs && s.Kind.Form == warm.Mounted && s.Ready > 0
		})
	})
	r.Context = podContext
	n.mustPublish(r)
	n.mustHave(r.Target, podContext)
	if !n.mustPublish(r).Existed {
		t.Error("the same request made another volume")
	}
	for _, context := range []string{otherContext, ""} {
		other := r
		other.Context = context
		_, err := n.PublishInline(t.Context(), other)
		n.mustDiffer(err)
	}
	if err := syscall.Unmount(r.Target, 0); err != nil { // a publish that stopped half-way
		t.Fatal(err)
	}
	n.mustPublish(r)
	n.mustHave(r.Target, podContext)
	n.mustUnpublish(r)
}

func (n *node) contextClaim(fs string) {
	t := n.t
	v := n.mustCreate(claim("claim-"+fs, fs, sizeFor(fs)))
	r := n.publishRequest(v, "pod")
	r.Context = podContext
	stage := StageRequest{ID: v.ID, Staging: r.Staging, Use: r.Use}
	for range 2 {
		if err := n.Stage(t.Context(), stage); err != nil {
			t.Fatal(err)
		}
		n.mustHave(r.Staging, podContext)
	}
	for range 2 {
		if err := n.PublishClaim(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		n.mustHave(r.Target, podContext)
	}
	second := n.publishRequest(v, "second")
	for _, context := range []string{otherContext, ""} {
		r, stage, second := r, stage, second
		r.Context, stage.Context, second.Context = context, context, context
		n.mustDiffer(n.Stage(t.Context(), stage))
		n.mustDiffer(n.PublishClaim(t.Context(), r))
		n.mustDiffer(n.PublishClaim(t.Context(), second))
	}
	n.contextCopy(v)
	n.mustUnpublishClaim(v, "pod")
	n.contextRevived(stage)
	n.contextGrown(v, stage)
	stage.Context = otherContext
	if err := n.Stage(t.Context(), stage); err != nil {
		t.Fatal(err)
	}
	n.mustHave(stage.Staging, otherContext)
	n.mustEnd(v)
}

// contextCopy: a copy of a volume in use has the files of its source, and the context of its own pod.
func (n *node) contextCopy(v image.Record) {
	snap := n.mustSnapshot("snap-"+v.Name, v.ID)
	r := claim("copy-"+v.Name, v.Spec.Filesystem, v.Spec.Size)
	r.Source = image.Source{Snapshot: snap.ID}
	clone := n.mustCreate(r)
	p := n.publishRequest(clone, "pod")
	p.Context = otherContext
	if err := n.PublishClaim(n.t.Context(), p); err != nil {
		n.t.Fatal(err)
	}
	n.mustHave(p.Target, otherContext)
	n.mustEnd(clone, "pod")
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		n.t.Error(err)
	}
}

// contextRevived: a staged filesystem that gave up is mounted anew, with its context.
func (n *node) contextRevived(stage StageRequest) {
	remountReadOnly(n.t, stage.Staging)
	if err := n.Stage(n.t.Context(), stage); err != nil {
		n.t.Fatal(err)
	}
	n.mustHave(stage.Staging, podContext)
}

// contextGrown: what is staged for reading only is grown through a second mount, which the kernel
// allows only with the same context.
func (n *node) contextGrown(v image.Record, stage StageRequest) {
	t := n.t
	n.mustUnstage(v.ID)
	stage.ReadOnly = true
	if err := n.Stage(t.Context(), stage); err != nil {
		t.Fatal(err)
	}
	want := Size{Required: v.Spec.Size + 256*mib} // a btrfs cannot be resized to less
	if _, _, err := n.Expand(v.ID, want, nil); err != nil {
		t.Error(err)
	}
	if _, err := n.ExpandOnNode(v.ID, stage.Staging, want, nil); err != nil {
		t.Error(err)
	}
	n.mustUnstage(v.ID)
}

// contextDisk: the directory of a disk.img and the image itself have the context.
func (n *node) contextDisk() {
	t := n.t
	r := n.request("disk", "raw", 16*mib)
	r.Mode, r.Context = image.ModeDiskImage, podContext
	n.mustPublish(r)
	n.mustPublish(r)
	for _, path := range []string{r.Target, filepath.Join(r.Target, image.DiskName)} {
		if got := n.labelOf(path); got != podContext {
			t.Errorf("%s has the label %s", path, got)
		}
	}
	other := r
	other.Context = otherContext
	_, err := n.PublishInline(t.Context(), other)
	n.mustDiffer(err)
	n.mustUnpublish(r)

	v := n.mustCreate(ClaimRequest{Name: "disk", Spec: diskfs.Spec{Filesystem: "raw", Size: 16 * mib}, Mode: image.ModeDiskImage})
	publish := func(pod, context string) error {
		p := n.publishRequest(v, pod)
		p.Context = context
		return n.PublishClaim(t.Context(), p)
	}
	if err := errors.Join(publish("one", podContext), publish("one", podContext), publish("two", podContext)); err != nil {
		t.Fatal(err)
	}
	n.mustDiffer(publish("one", otherContext))
	if err := publish("three", otherContext); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), otherContext) {
		t.Errorf("a second pod with another context: %v", err)
	}
	n.mustUnpublishClaim(v, "one")
	n.mustUnpublishClaim(v, "two")
	if err := publish("three", otherContext); err != nil {
		t.Fatal(err)
	}
	if got := n.labelOf(filepath.Join(n.target(v.ID+"-three"), image.DiskName)); got != otherContext {
		t.Errorf("the disk.img has the label %s", got)
	}
	n.mustEnd(v, "three")
}

// contextShown: a context is compared with what the kernel makes of it.
func (n *node) contextShown() {
	t := n.t
	for i, level := range []string{
		"s0", "s0:c0", "s0:c2,c1", "s0:c1.c2", "s0:c1,c2,c3", "s0:c7,c1.c3,c5.c6", "s0-s0", "s0-s0:c0.c7", "s0:c1-s0:c2,c1", "s0:c2,c1-s0:c1,c2", "s0:c3.c3",
	} {
		access, err := image.ParseMountFlags([]string{`context="system_u:object_r:container_file_t:` + level + `"`}, image.Inline)
		if err != nil {
			t.Fatal(err)
		}
		r := n.request(fmt.Sprint("shown-", i), "raw", mib)
		r.Mode, r.Access = image.ModeDiskImage, access
		n.mustPublish(r)
		info, err := mount.At(r.Target)
		if err != nil || info == nil {
			t.Fatalf("%v, %v", info, err)
		}
		if got := image.AccessOf(info).Context; got != access.Context {
			t.Errorf("%s is read as %s, and the kernel shows %s", level, access.Context, got)
		}
		n.mustUnpublish(r)
	}
}

// contextUnknown: the error of a context that the policy does not know says so, and leaves nothing.
func (n *node) contextUnknown() {
	t := n.t
	for _, mode := range image.MountModes {
		r := n.request("unknown", "ext4", 64*mib)
		r.Mode, r.Context = mode, "system_u:object_r:nobody_t:s0"
		_, err := n.PublishInline(t.Context(), r)
		if err == nil || !strings.Contains(err.Error(), "nobody_t") || !strings.Contains(err.Error(), "policy") {
			t.Errorf("%s: %v", mode, err)
		}
		t.Log(err)
		if names, err := n.pool.Volumes(); err != nil || slices.Contains(names, r.ID) {
			t.Errorf("%s: it left %v, %v", mode, names, err)
		}
	}
}
