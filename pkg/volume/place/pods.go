// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Home is what kubelet's directory tells of a user of a volume.
type Home struct {
	Path  string // whose existence decides
	Gone  bool   // proven
	Doubt string // why nothing can be said; "" if something can
}

// Pod tells whether the pod that a target is for is still there.
func (r *Root) Pod(target string) Home {
	if err := r.seesPods(); err != nil {
		return Home{Doubt: fmt.Sprintf("whether its pod is gone cannot be told: %v; set --kubelet-dir to the kubelet's root directory", err)}
	}
	return r.home(target, podDir)
}

// Staging tells whether the directory where a volume is staged is still there.
func (r *Root) Staging(path string) Home {
	return r.home(path, func(rel string) string { return rel })
}

// podDir is the part of a target's path that belongs to the pod: kubelet removes a pod's
// directory when it is done with everything that the pod had, and not before. It is "" for
// the paths of another container orchestrator, of which nothing is known.
func podDir(rel string) string {
	parts := strings.Split(rel, string(filepath.Separator))
	if len(parts) < 3 || parts[0] != "pods" || parts[1] == "" {
		return ""
	}
	return filepath.Join(parts[0], parts[1])
}

// seesPods returns an error where all pods would seem to be gone, as before kubelet's disk
// is mounted. A kubelet that has run always has a pod: the plugin's own.
func (r *Root) seesPods() error {
	if same, err := image.SameFile(r.dir, r.resolved); err != nil || !same {
		return errors.Join(err, fmt.Errorf("%s is not the directory that it was at start", r.path))
	}
	pods, err := mount.OpenTarget(r.dir, "pods", syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer pods.Close()
	dir, err := mount.Open(pods)
	if err != nil {
		return err
	}
	defer dir.Close()
	if _, err := dir.Readdirnames(1); err != nil {
		return fmt.Errorf("there is no pod in %s: %w", pods.Name(), err)
	}
	return nil
}

// home tells whether the part of a path that decides is there.
func (r *Root) home(path string, decides func(rel string) string) Home {
	rel, err := r.Rel(path)
	if err != nil {
		return Home{Path: path, Doubt: fmt.Sprintf("whether it is still wanted cannot be told: %v", err)}
	}
	part := decides(rel)
	if part == "" {
		return Home{Path: path, Doubt: fmt.Sprintf("whether its pod is gone cannot be told: %s is no path of a kubelet's; unpublish it", path)}
	}
	h := Home{Path: r.Path(part)}
	f, err := mount.OpenTarget(r.dir, part, 0)
	switch {
	case err == nil:
		f.Close()
	case errors.Is(err, os.ErrNotExist):
		h.Gone = true
	default:
		h.Doubt = fmt.Sprintf("whether it is still wanted cannot be told: %v", err)
	}
	return h
}
