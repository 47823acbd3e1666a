// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package torture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-disktemplate/csi-disktemplate/internal/harness"
	"github.com/csi-disktemplate/csi-disktemplate/internal/harness/harnesstest"
	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	linuxmount "github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// disk is a volume as the container orchestrator knows it: an inline one, or a claim.
type disk struct {
	id, fs string
	bytes  int64
	inline bool
	label  string
	mode   string // filesystem, diskImage or block
	thick  bool
	source *csi.VolumeContentSource

	content string // what it is born with; "" is nothing

	from, commitTo string // the golden that it starts from, and the one that it becomes a generation of

	volatile bool
}

const mib = 1 << 20

// namespace is that of every pod and claim.
const namespace = "torture"

// sizes are about the smallest that each filesystem takes.
var sizes = map[string]int64{"ext4": 64 * mib, "xfs": 300 * mib, "btrfs": 128 * mib}

func inline(id, fs, mode string) *disk {
	return &disk{id: id, fs: fs, bytes: sizes[fs], inline: true, mode: mode}
}

// volatile is an inline volume whose syncs cost nothing. It is empty in each boot.
func volatile(id, fs string) *disk {
	d := inline(id, fs, "filesystem")
	d.volatile = true
	return d
}

func claim(id, fs, mode string) *disk { return &disk{id: id, fs: fs, bytes: sizes[fs], mode: mode} }

// copyOf is a claim with the content of a snapshot or, without one, of another claim.
func copyOf(id string, from *disk, snapshot string) *disk {
	d := *from
	d.id = id
	d.source = harness.FromVolume(from.id)
	if snapshot != "" {
		d.source = harness.FromSnapshot(snapshot)
	}
	return &d
}

func (d *disk) capability() *csi.VolumeCapability {
	if d.mode == "block" {
		return harness.Block()
	}
	return harness.Mounted(d.fs)
}

func (d *disk) String() string {
	kind := d.fs + " " + d.mode
	if d.thick {
		kind = "thick " + kind
	}
	return fmt.Sprintf("volume %s (%s)", d.id, kind)
}

func (d *disk) pod() string { return "uid-of-" + d.id }

func (n *node) podDir(d *disk) string { return n.PodDir(d.pod()) }

// volume is the disk as kubelet calls for it. Its directories are made, as kubelet does before each call.
func (n *node) volume(d *disk) *harness.Volume {
	n.t.Helper()
	v := n.Claim(d.id, d.capability(), d.pod())
	if d.inline {
		attributes := map[string]string{"size": fmt.Sprint(d.bytes), "publishAs": d.mode}
		if d.label != "" {
			attributes["label"] = d.label
		}
		if d.volatile {
			attributes["durability"] = "volatile"
		}
		if d.content != "" {
			attributes["content"] = d.content
		}
		d.lineage(attributes)
		v = n.Inline(d.id, d.fs, harness.Pod{Namespace: namespace, Name: "pod-of-" + d.id, UID: d.pod()}, attributes)
	}
	n.must("making kubelet's directories", v.MakeDirs())
	return v
}

// lineage adds what attributes or parameters say of a disk's goldens.
func (d *disk) lineage(to map[string]string) {
	if d.from != "" {
		to["from"] = d.from
	}
	if d.commitTo != "" {
		to["commitTo"] = d.commitTo
	}
}

func (n *node) create(d *disk) error {
	parameters := map[string]string{}
	if d.thick {
		parameters["provisioning"] = "thick"
	}
	if d.mode == "diskImage" {
		parameters["publishAs"] = "diskImage"
	}
	if d.content != "" {
		parameters["content"] = d.content
	}
	if d.lineage(parameters); d.content+d.from+d.commitTo != "" {
		parameters["csi.storage.k8s.io/pvc/namespace"] = namespace
	}
	r := harness.CreateRequest(d.id, d.bytes, d.capability(), parameters)
	r.VolumeContentSource = d.source
	_, err := n.Create(context.Background(), r)
	return err
}

// delete deletes a disk, and asks again while a copy of its mount keeps the plugin from that, as the provisioner does:
// whoever makes a mount namespace on this machine has a copy of each mount, until its first commands have run.
func (n *node) delete(d *disk) error {
	deadline := time.Now().Add(harness.CallTimeout)
	for {
		err := n.Delete(context.Background(), d.id)
		if err == nil || !strings.Contains(err.Error(), "a process in another mount namespace has a copy of its mount") || time.Now().After(deadline) {
			return err
		}
	}
}

func (n *node) stage(d *disk) error     { return n.Stage(context.Background(), n.volume(d)) }
func (n *node) unstage(d *disk) error   { return n.Unstage(context.Background(), n.volume(d)) }
func (n *node) publish(d *disk) error   { return n.Publish(context.Background(), n.volume(d)) }
func (n *node) unpublish(d *disk) error { return n.Unpublish(context.Background(), n.volume(d)) }

func (n *node) expand(d *disk, bytes int64) error {
	return n.Expand(context.Background(), d.id, bytes)
}

func (n *node) expandOnNode(d *disk, bytes int64) error {
	return n.ExpandOnNode(context.Background(), n.volume(d), bytes)
}

func (n *node) snapshot(name string, d *disk) error {
	_, err := n.Snapshot(context.Background(), name, d.id)
	return err
}

func (n *node) deleteSnapshot(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), harness.CallTimeout)
	defer cancel()
	_, err := n.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: name})
	return err
}

// contentSize is the length of what a pod writes to a disk: a word and zeros.
const contentSize = 4096

func (n *node) contentFile(d *disk) string {
	target := n.volume(d).Target
	switch d.mode {
	case "block":
		return target
	case "diskImage":
		return filepath.Join(target, "disk.img")
	}
	return filepath.Join(target, "content")
}

// write writes a word as a pod does, and syncs it.
func (n *node) write(d *disk, word string) error {
	flags := os.O_RDWR
	if d.mode == "filesystem" {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(n.contentFile(d), flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, contentSize)
	copy(b, word)
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// read reads what was written last, as a pod does.
func (n *node) read(d *disk) (string, error) {
	f, err := os.Open(n.contentFile(d))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, contentSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return "", err
	}
	return strings.TrimRight(string(b), "\x00"), nil
}

// holds returns an error if a published disk has none of the words.
func (n *node) holds(d *disk, words ...string) error {
	got, err := n.read(d)
	if err != nil {
		return err
	}
	if slices.Contains(words, got) {
		return nil
	}
	return fmt.Errorf("%s holds %.40q, expected %q", d, got, strings.Join(words, `" or "`))
}

// lacks returns an error if a published disk holds anything that a pod wrote.
func (n *node) lacks(d *disk) error {
	switch got, err := n.read(d); {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	default:
		return fmt.Errorf("%s holds %.40q, expected nothing", d, got)
	}
}

// flushes returns an error if a sync in a published filesystem makes no flush, or if one in a volatile volume does.
func (n *node) flushes(d *disk) error {
	if d.mode != "filesystem" {
		return nil
	}
	root, err := os.OpenFile(n.volume(d).Target, unix.O_PATH, 0) // its filesystem may have shut down
	if err != nil {
		return err
	}
	defer root.Close()
	is, err := linuxmount.Of(root)
	if err != nil {
		return err
	}
	if is == nil {
		return fmt.Errorf("volume %s is not mounted", d.id)
	}
	mode, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(is.Source), "queue/write_cache"))
	if err != nil {
		return err
	}
	if drops := strings.TrimSpace(string(mode)) == "write through"; drops != d.volatile {
		return fmt.Errorf("volume %s is on %s in the mode %q, and volatile is %v", d.id, is.Source, mode, d.volatile)
	}
	return nil
}

// endIn waits until an unpublished volume has ended, or the plugin was killed meanwhile.
func (n *node) endIn(d *disk) error {
	if err := n.unpublish(d); err != nil {
		return err
	}
	harnesstest.Settles(n.volumes, "")
	select {
	case <-n.Exited():
		return status.Error(codes.Unavailable, "the plugin was killed after its answer")
	default:
		return nil
	}
}

// reboot kills the plugin, unmounts a disk and starts the plugin in another boot.
func (n *node) reboot(d *disk) error {
	n.kill()
	n.unmountAll(d)
	n.anotherBoot()
	n.start()
	return nil
}

// anotherBoot has the next plugin believe in another boot.
func (n *node) anotherBoot() { n.boot = uuid.NewString() }

// forget has kubelet forget the pod of a disk and all of its directories without calling the plugin: the node was
// rebooted, and the pod was deleted meanwhile.
func (n *node) forget(d *disk) {
	n.t.Helper()
	n.unmountAll(d)
	if err := errors.Join(os.RemoveAll(n.podDir(d)), os.RemoveAll(n.StagingDir(d.id))); err != nil {
		n.t.Fatal(err)
	}
}

// unmountAll unmounts a disk by hand.
func (n *node) unmountAll(d *disk) {
	n.t.Helper()
	mounts, err := harness.Mounts(n.volume(d).Target)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, m := range slices.Backward(mounts) {
		testenv.Run(n.t, "umount", m)
	}
}
