// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package failpoint lets tests kill the plugin, or make it fail, between any two of its
// effects on the node.
//
// An effect is a call that changes what outlives this process, or what others can see. It
// is announced before it happens:
//
//	if err := failpoint.Before("linkat"); err != nil {
//		return err
//	}
//
// The functions that wrap system calls do that (pkg/linux/internal/sys). So every operation
// has a failpoint between any two of its effects without a line in its own code. In a usual
// build Before is empty, and the compiler removes it. With the tag "failpoints" it follows
// the plan in the file [PlanFile], in the directory that the environment variable [Env]
// names:
//
//	7 3 kill
//
// This is plan 7: the process ends by SIGKILL before its third effect since the plan was
// written. With ENOSPC, EIO, EBUSY, EINTR or ENOMEM instead of kill, that effect does not
// happen, and its call fails with this error. The effects since the plan was written are
// listed in the file [TraceFile] followed by the plan's number, so a plan for effect 0
// shows all effects of an operation.
package failpoint

const (
	// Env is the environment variable with the directory. Without it nothing fails.
	Env = "CSI_DISKTEMPLATE_FAILPOINTS"
	// PlanFile is read before each effect.
	PlanFile = "plan"
	// InitEnv is the environment variable with the program that is the formatting VM's init.
	// The product can be that itself only if it is linked statically, and a build with the
	// race detector is not.
	InitEnv = "CSI_DISKTEMPLATE_INIT"
	// BootEnv is the environment variable with the id of this boot of the node. With another id
	// the node was rebooted, for the plugin.
	BootEnv = "CSI_DISKTEMPLATE_BOOT"
	// TraceFile is the beginning of a name. The plan's number follows.
	TraceFile = "trace."
)
