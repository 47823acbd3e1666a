// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/process"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// NodeRequirements are what volumes need of the kernel and of the plugin's privileges, whatever the pool is.
func NodeRequirements() []health.Requirement {
	return []health.Requirement{
		{Name: "capabilities", Look: capabilityConditions, Good: func() string { return "CAP_SYS_ADMIN and CAP_SYS_RESOURCE are in effect" }},
		{Name: "node-kernel", Look: kernelConditions, Good: func() string { return "the kernel tells of one mount without listing all (statmount)" }},
	}
}

const privileged = "run the container privileged (privileged: true), and not in a user namespace"

func capabilityConditions() (found []health.Condition) {
	if may, err := process.Capable(process.SysAdmin); err == nil && !may {
		found = append(found, health.Condition{
			Code: health.CapabilityMissing, Object: "CAP_SYS_ADMIN", Severity: health.Inaccessible,
			Text: "the plugin lacks CAP_SYS_ADMIN, and can mount nothing", Remedy: privileged,
		})
	}
	if err := fsctl.MayGrow("ext4"); err != nil {
		found = append(found, health.Condition{
			Code: health.CapabilityMissing, Object: "CAP_SYS_RESOURCE", Severity: health.Limited, StillReady: true,
			Text:   "the plugin lacks CAP_SYS_RESOURCE",
			Cost:   "an ext4 that is expanded while a pod uses it grows only when the volume is staged the next time",
			Remedy: privileged + ", or add the capability SYS_RESOURCE",
		})
	}
	return found
}

func kernelConditions() []health.Condition {
	if mount.Single() {
		return nil
	}
	return []health.Condition{{
		Code: health.SlowMountTable, Severity: health.Limited, StillReady: true,
		Text:   "the kernel has no statmount(2) that tells everything of a mount",
		Cost:   "each call reads the list of all mounts, and takes longer with each volume of the node",
		Remedy: "use Linux 6.13 or newer",
	}}
}

// Requirements are what volumes need of the pool's space, and of earlier processes.
func (m *Manager) Requirements() []health.Requirement {
	return []health.Requirement{
		{Name: "pool-space", Look: m.spaceConditions, Good: m.describeSpace},
		{Name: "leftovers", Look: m.leftovers.conditions, Good: m.leftovers.describe},
	}
}

// DiskRequirement is met if each disk.img has the length of its volume, as [Manager.CheckDisks] found.
func (m *Manager) DiskRequirement() health.Requirement {
	return health.Requirement{Name: "disk-images", Look: m.DiskHealth, Good: func() string { return "each disk.img has the length of its volume" }}
}

func (m *Manager) describeSpace() string {
	has, err := m.pool.Space()
	if err != nil || m.pool.Check() != nil {
		return ""
	}
	return fmt.Sprintf("%s of %s are free", size.Format(has.Available), size.Format(has.Total))
}

// leftovers are what the last sweep found, or what the next one would do, if none was made by this process.
type leftovers struct {
	mu      sync.Mutex
	actions []sweep.Action
	at      time.Time // zero before the first sweep
}

func (l *leftovers) note(actions []sweep.Action) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.actions, l.at = actions, time.Now()
}

// remain are the actions after which something is left: those that failed, that were only planned, and that are for
// somebody else.
func (l *leftovers) remain() (remain []sweep.Action, at time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.actions {
		if a.Failed() || a.Result == "" || a.Verb == sweep.Leave {
			remain = append(remain, a)
		}
	}
	return remain, l.at
}

func (l *leftovers) conditions() []health.Condition {
	remain, _ := l.remain()
	if len(remain) == 0 {
		return nil
	}
	planned := !slices.ContainsFunc(remain, func(a sweep.Action) bool { return a.Failed() || a.Verb == sweep.Leave })
	first := remain[0]
	c := health.Condition{
		Code: health.LeftBehind, Severity: health.Degraded, StillReady: true,
		Text:   fmt.Sprintf("crashes and lost calls left %d things behind, of which the first is %s: %s", len(remain), first.Object, first.Reason),
		Cost:   "they take space, loop devices or mounts",
		Remedy: "`csi-disktemplate gc --dry-run` lists them all; those that the sweep leaves alone need somebody to look",
	}
	if planned {
		c.Remedy = "start the plugin, which sweeps them away, or run `csi-disktemplate gc`"
	}
	return []health.Condition{c}
}

func (l *leftovers) describe() string {
	if _, at := l.remain(); at.IsZero() {
		return "no sweep was made yet"
	}
	return "nothing was left behind"
}
