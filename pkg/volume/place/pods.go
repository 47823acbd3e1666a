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

// Home says whether a directory that belongs to a user of a volume still exists below
// kubelet's.
type Home struct {
	Path  string // the directory
	Gone  bool   // it is proven that there is none
	Doubt string // why nothing is proven; "" if there is no doubt
}

// Pod reports whether the directory of a target's pod is still there.
func (r *Root) Pod(target string) Home {
	if err := r.seesPods(); err != nil {
		return Home{Doubt: fmt.Sprintf("the plugin cannot tell whether its pod is gone: %v; set --kubelet-dir to kubelet's root directory", err)}
	}
	return r.home(target, podDir)
}

// Staging reports whether the directory where a volume is staged is still there.
func (r *Root) Staging(path string) Home {
	return r.home(path, func(rel string) string { return rel })
}

// podDir is the part of a target's path that is the pod's directory. Kubelet removes that
// directory when it is done with everything that the pod had, and not before. podDir is ""
// for the paths of another container orchestrator, because nothing is known about those.
func podDir(rel string) string {
	parts := strings.Split(rel, string(filepath.Separator))
	if len(parts) < 3 || parts[0] != "pods" || parts[1] == "" {
		return ""
	}
	return filepath.Join(parts[0], parts[1])
}

// seesPods returns an error if no pod is to be seen, for example because kubelet's disk is
// not mounted yet. A kubelet that has run always has one pod: the plugin's own.
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

// home reports whether the part of a path that decides returns is there.
func (r *Root) home(path string, decides func(rel string) string) Home {
	rel, err := r.Rel(path)
	if err != nil {
		return Home{Path: path, Doubt: fmt.Sprintf("the plugin cannot tell whether it is still wanted: %v", err)}
	}
	part := decides(rel)
	if part == "" {
		return Home{Path: path, Doubt: fmt.Sprintf("the plugin cannot tell whether its pod is gone: %s is not a path that kubelet would use; unpublish it", path)}
	}
	h := Home{Path: r.Path(part)}
	f, err := mount.OpenTarget(r.dir, part, 0)
	switch {
	case err == nil:
		f.Close()
	case errors.Is(err, os.ErrNotExist):
		h.Gone = true
	default:
		h.Doubt = fmt.Sprintf("the plugin cannot tell whether it is still wanted: %v", err)
	}
	return h
}
