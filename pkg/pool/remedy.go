// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

// CleanAll is the command that removes the cached templates of this process's pool, as somebody
// types it who reads a message. The command line of the plugin sets it once, before it opens
// the pool: it alone knows whether the plugin is in a pod, and with which --pool.
var CleanAll = "csi-disktemplate clean-all"

// MakeRoom, if not empty, is what a message about a full pool says to do, in a process whose pool is
// only a cache: see [OpenCache].
var MakeRoom string

// remedy is what a message about a full pool says to do.
func remedy() string {
	if MakeRoom != "" {
		return MakeRoom
	}
	return "delete volumes, " + DropTemplates() + ", or enlarge the pool"
}

// DropTemplates is the part of a message about a full pool that says how to remove templates.
func DropTemplates() string { return "drop cached templates (`" + CleanAll + "`)" }
