// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestHotplugged has VMs use a disk.img whose pod is gone, each in another way. Unpublishing succeeds, and
// the volume is neither unstaged nor deleted until the VM lets go of it.
func TestHotplugged(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			for name, use := range map[string]func(n *node, path string) (end func(), says string){
				"bound into the VM's pod":       (*node).boundElsewhere,
				"in QEMU, in a pod":             (*node).runsInPod,
				"in QEMU, mounted nowhere":      (*node).runsUnmounted,
				"in QEMU, in another container": (*node).runsUnseen,
			} {
				t.Run(name, func(t *testing.T) { n.with(t).hotplugged(use) })
			}
		})
	}
}

func (n *node) hotplugged(use func(n *node, path string) (end func(), says string)) {
	t := n.t
	v := n.mustCreate(ClaimRequest{Name: "hotplugged", Spec: diskfs.Spec{Filesystem: "raw", Size: 16 * mib}, Mode: image.ModeDiskImage})
	path := filepath.Join(n.mustPublishClaim(v, "attachment"), image.DiskName)
	end, says := use(n, path)
	n.mustUnpublishClaim(v, "attachment")
	for call, err := range map[string]error{"unstage": n.Unstage(v.ID, n.staging(v.ID)), "delete": n.DeleteClaim(v.ID)} {
		if t.Log(err); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", call, err, says)
		}
	}
	// It is published again for another attachment pod, as KubeVirt does when it plugs a second disk.
	n.mustPublishClaim(v, "attachment")
	end()
	n.mustEnd(v, "attachment")
}

// boundElsewhere binds the file into the pod of a VM on the host, as virt-handler does.
func (n *node) boundElsewhere(path string) (end func(), says string) {
	at := filepath.Join(n.kubelet, "pods", "vm", "volumes", "kubernetes.io~empty-dir", "hotplug-disks", "hotplugged.img")
	if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, nil, 0o644)); err != nil {
		n.t.Fatal(err)
	}
	testenv.Run(n.t, "mount", "--bind", path, at)
	return func() { testenv.Umount(n.t, at) }, "disk.img is mounted at " + at
}

// qemu runs QEMU without a machine, with a disk. It has opened the disk when it greets.
var qemu = []string{"qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-monitor", "stdio", "-drive"}

// runsInPod has QEMU use the file in a mount namespace like a pod's, which has a mount of its own of it.
func (n *node) runsInPod(path string) (end func(), says string) {
	n.mustGive(path)
	args := inPod(filepath.Dir(path), slices.Concat(qemu, []string{"if=none,format=raw,file=" + image.DiskName})...)
	_, end = n.mustStart("unshare", args...)
	return end, "disk.img is mounted at /mnt/disk.img in the mount namespace of process "
}

// runsUnmounted has QEMU use the file by a descriptor that it was given, where no mount of it is left.
func (n *node) runsUnmounted(path string) (end func(), says string) {
	n.mustGive(path)
	const prepare = `cd "$0" && exec 3<>disk.img 4<disk.img && cd / && umount --recursive --lazy "$0" && exec setpriv --reuid 107 --regid 107 --clear-groups "$@"`
	args := slices.Concat([]string{"--mount", "sh", "-c", prepare, filepath.Dir(path)}, qemu, []string{"if=none,format=raw,file=/dev/fdset/1", "-add-fd", "fd=3,set=1", "-add-fd", "fd=4,set=1"})
	_, end = n.mustStart("unshare", args...)
	return end, "disk.img is open in process "
}

// runsUnseen is [node.runsInPod] where /proc does not show the process, as in a container that has not the
// node's PID namespace.
func (n *node) runsUnseen(path string) (end func(), says string) {
	n.mustGive(path)
	args := inPod(filepath.Dir(path), slices.Concat(qemu, []string{"if=none,format=raw,file=" + image.DiskName})...)
	pid, kill := n.mustStart("unshare", args...)
	at := fmt.Sprint("/proc/", pid)
	testenv.Run(n.t, "mount", "--bind", n.t.TempDir(), at)
	return func() { testenv.Umount(n.t, at); kill() }, "disk.img is open in a process that /proc does not show here"
}

// mustStart starts a program and waits until it has said something.
func (n *node) mustStart(name string, args ...string) (pid int, end func()) {
	n.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	end = func() { errors.Join(cmd.Process.Kill(), cmd.Wait()) }
	n.t.Cleanup(end)
	if _, err := out.Read(make([]byte, 1)); err != nil {
		n.t.Fatal(fmt.Errorf("%s: %w", cmd, err))
	}
	return cmd.Process.Pid, end
}
