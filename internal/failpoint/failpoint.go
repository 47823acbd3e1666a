// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package failpoint lets tests end the plugin, or make it fail, between any two of its
// effects on the node.
//
// Whatever changes something that outlives the call, or that others can see, says so
// beforehand:
//
//	if err := failpoint.Before("linkat"); err != nil {
//		return err
//	}
//
// so that the points lie in the functions that wrap system calls, and every operation
// has one between any two of its effects without a word in its own code. In a usual
// build Before is empty, and the compiler leaves nothing of it. With the tag
// "failpoints" it does what the file [PlanFile] says, in the directory that the
// environment's [Env] names:
//
//	7 3 kill
//
// is plan 7: the process ends by SIGKILL before its third effect since the plan was
// written; with ENOSPC, EIO, EBUSY, EINTR or ENOMEM for kill, that effect does not
// happen and fails. The effects since then are listed in the file [TraceFile] with the
// plan's number behind it, so that a plan for effect 0 shows what there is.
package failpoint

const (
	// Env names the directory, in the environment. Without it nothing fails.
	Env = "CSI_DISKTEMPLATE_FAILPOINTS"
	// PlanFile is read before each effect.
	PlanFile = "plan"
	// InitEnv names the program that is the formatting VM's init. The product itself can
	// be that only if it is linked statically, which nothing is that has the race detector.
	InitEnv = "CSI_DISKTEMPLATE_INIT"
	// TraceFile is followed by a plan's number.
	TraceFile = "trace."
)
