// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// Requirement is kubelet's directory at a path: it is there, and what is mounted below it is seen outside of this
// mount namespace. A plugin in a pod cannot work without the latter: pods would get empty directories of the node.
func Requirement(path string, inPod bool) health.Requirement {
	return health.Requirement{
		Name: "kubelet-dir",
		Look: func() []health.Condition { return conditions(path, inPod) },
		Good: func() string {
			return fmt.Sprintf("%s is there, and what is mounted below it is seen by the whole node", path)
		},
	}
}

func conditions(path string, inPod bool) []health.Condition {
	root, err := Open(path)
	if err != nil {
		text, remedy := health.Advice(err)
		return []health.Condition{{Code: health.KubeletDirUnusable, Severity: health.Inaccessible, Text: text, Remedy: remedy}}
	}
	defer root.Close()
	on, err := mount.Holding(root.dir)
	if errors.Is(err, mount.ErrNotMounted) || err == nil && on.Shared {
		return nil // a mount that is detached tells nothing
	}
	if err != nil {
		return []health.Condition{{Code: health.KubeletDirUnusable, Severity: health.Inaccessible, Text: err.Error()}}
	}
	c := health.Condition{
		Code: health.MountsNotShared, Severity: health.Limited, StillReady: true,
		Text:   fmt.Sprintf("what the plugin mounts below %s is seen in its own mount namespace alone", path),
		Cost:   "volumes work only for a kubelet in the same namespace, and not for one outside of a container",
		Remedy: "mount it with mountPropagation: Bidirectional into the plugin's container; on the node, run mount --make-rshared /",
	}
	if inPod {
		c.Severity, c.StillReady = health.Inaccessible, false
		c.Cost = "pods get empty directories of the node instead of their volumes"
	}
	return []health.Condition{c}
}
