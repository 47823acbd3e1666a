// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/internal/loops"
)

const driver = "csi.disktemplate.io"

// Node is a machine as the plugin sees it.
type Node struct {
	Pool    string // the pool's directory
	Kubelet string // kubelet's directory, /var/lib/kubelet on a real node
}

// Make makes the directories that kubelet has before the plugin starts: that of its socket, and that of the pod which the
// plugin is in itself.
func (n Node) Make() error {
	return errors.Join(os.MkdirAll(filepath.Dir(n.Socket()), 0o750), os.MkdirAll(n.PodDir("uid-of-plugin"), 0o750))
}

// Socket is where the plugin listens.
func (n Node) Socket() string { return filepath.Join(n.Kubelet, "plugins", driver, "csi.sock") }

// Endpoint is the socket as --endpoint and gRPC have it.
func (n Node) Endpoint() string { return "unix://" + n.Socket() }

// PodDir is kubelet's directory of a pod.
func (n Node) PodDir(uid string) string { return filepath.Join(n.Kubelet, "pods", uid) }

// Target is where kubelet publishes a pod's volume.
func (n Node) Target(uid, volume string) string {
	return filepath.Join(n.PodDir(uid), "volumes", "kubernetes.io~csi", volume, "mount")
}

// StagingDir is kubelet's directory of a claim. Kubelet names it by a hash of the volume's id.
func (n Node) StagingDir(id string) string {
	return filepath.Join(n.Kubelet, "plugins", "kubernetes.io", "csi", driver, id)
}

// Staging is where kubelet stages a claim.
func (n Node) Staging(id string) string { return filepath.Join(n.StagingDir(id), "globalmount") }

// Found is what there is of volumes on a node.
type Found struct {
	Images, Snapshots []string // names of files in the pool
	Loops             []string // loop devices on files of the pool, without /dev
	Ready             []string // those of volumes that a plugin keeps ready: they end with the plugin
	Mounts            []string // below kubelet's directory, in the order in which they were mounted
}

// Find looks for volumes.
func (n Node) Find() (Found, error) {
	images, err := names(filepath.Join(n.Pool, "volumes"))
	if err != nil {
		return Found{}, err
	}
	snapshots, err := names(filepath.Join(n.Pool, "snapshots"))
	if err != nil {
		return Found{}, err
	}
	found := Found{Images: images, Snapshots: snapshots}
	devices, err := loops.Below(n.Pool)
	if err != nil {
		return Found{}, err
	}
	for _, d := range devices {
		if n.isReady(d, images) {
			found.Ready = append(found.Ready, d.Name)
			continue
		}
		found.Loops = append(found.Loops, d.Name)
	}
	found.Mounts, err = Mounts(n.Kubelet)
	return found, err
}

// ReadyLabel is the name of a device that was attached ahead. It keeps the name when it becomes a volume's.
const ReadyLabel = "(ready)"

// IsReady reports whether a loop device has a volume that is kept ready.
func (n Node) IsReady(d loops.Device) (bool, error) {
	images, err := names(filepath.Join(n.Pool, "volumes"))
	return n.isReady(d, images), err
}

func (n Node) isReady(d loops.Device, images []string) bool {
	return d.Label == ReadyLabel && !n.isVolume(images, d.Backing)
}

// isVolume reports whether a file is one of the images.
func (n Node) isVolume(images []string, file loops.File) bool {
	return slices.ContainsFunc(images, func(name string) bool {
		is, err := loops.FileOf(filepath.Join(n.Pool, "volumes", name))
		return err == nil && is == file
	})
}

// List is all that was found of volumes that somebody asked for, each with its kind in its name.
func (f Found) List() (all []string) {
	for _, name := range f.Images {
		all = append(all, "volumes/"+name)
	}
	for _, name := range f.Snapshots {
		all = append(all, "snapshots/"+name)
	}
	return append(append(all, f.Loops...), f.Mounts...)
}

// Mounts lists the mounts at a directory and below it, in the order in which they were mounted.
func Mounts(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	var paths []string
	for _, m := range infos {
		paths = append(paths, m.Mountpoint)
	}
	return paths, err
}

// names lists a directory, which may be missing: a plugin that has never run has made none.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}
